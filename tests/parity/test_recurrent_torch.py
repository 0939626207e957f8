"""Recurrent stacks against PyTorch's, with the same weights, ragged rows and float64 on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.models.recurrent import Recurrent
from jaxdl.paths import flatten

torch = pytest.importorskip("torch")
rnn = torch.nn.utils.rnn

B, T, D, F = 4, 6, 3, 5
LENGTHS = np.array([6, 1, 4, 3])
X = np.random.default_rng(0).normal(size=(B, T, D))
WEIGHTS = np.random.default_rng(1).normal(size=(B, T, 2 * F))
CELLS = ["rnn", "rnn_relu", "lstm", "gru"]


@pytest.fixture(autouse=True)
def float64():
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)


def make_torch(cell, n_layers, bidirectional):
    torch.manual_seed(0)
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    options = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    return kind(D, F, n_layers, batch_first=True, bidirectional=bidirectional, **options)


def to_flax(named):
    """`weight_ih_l0_reverse` -> `layer_0/backward/input/kernel`."""
    tree = {}
    for name, tensor in named:
        kind, side, layer, *reverse = name.split("_")
        direction = tree.setdefault(f"layer_{layer[1:]}", {}).setdefault("backward" if reverse else "forward", {})
        value = tensor.detach().numpy().copy()
        direction.setdefault({"ih": "input", "hh": "recurrent"}[side], {})[
            {"weight": "kernel", "bias": "bias"}[kind]
        ] = value.T
    return tree


def make_ours(cell, n_layers, bidirectional):
    return Recurrent(
        width=F, cell=cell, n_layers=n_layers, bidirectional=bidirectional, dtype=jnp.float64, param_dtype=jnp.float64
    )


def run_torch(module, x, start=None):
    packed = rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    outputs, carry = module(packed, start)
    outputs, _ = rnn.pad_packed_sequence(outputs, batch_first=True, total_length=T)
    return outputs, carry if isinstance(carry, tuple) else (carry,)


def value(outputs, carry):
    """A loss that depends on every output and every state, with different weights."""
    n = outputs.shape[-1]
    weights = torch.tensor(WEIGHTS[..., :n]) if isinstance(outputs, torch.Tensor) else WEIGHTS[..., :n]
    return (weights * outputs**2).sum() + sum((k + 1.5) * (state**2).sum() for k, state in enumerate(carry))


def assert_same(ours, theirs, what):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys(), what
    for path, expected in theirs.items():
        np.testing.assert_allclose(ours[path], expected, rtol=1e-8, atol=1e-11, err_msg=f"{what} {path}")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_outputs_states_and_gradients(cell, bidirectional):
    module, model = make_torch(cell, 2, bidirectional), make_ours(cell, 2, bidirectional)
    params = to_flax(module.named_parameters())
    x_torch = torch.tensor(X, requires_grad=True)
    outputs_torch, carry_torch = run_torch(module, x_torch)
    value(outputs_torch, carry_torch).backward()

    def loss(params, x):
        outputs, carry = model.apply({"params": params}, x, lengths=LENGTHS)
        return value(outputs, carry), (outputs, carry)

    (_, (outputs, carry)), (grads, x_grad) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, X)
    np.testing.assert_allclose(outputs, outputs_torch.detach().numpy(), rtol=1e-9, atol=1e-12)
    assert len(carry) == len(carry_torch)
    for ours, theirs in zip(carry, carry_torch, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(x_grad, x_torch.grad.numpy(), rtol=1e-8, atol=1e-11)
    assert_same(grads, to_flax((name, p.grad) for name, p in module.named_parameters()), "gradient")
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("cell", CELLS)
def test_a_given_carry_and_its_gradient(cell):
    module, model = make_torch(cell, 2, False), make_ours(cell, 2, False)
    n = 2 if cell == "lstm" else 1
    start = tuple(np.random.default_rng(2 + k).normal(size=(2, B, F)) for k in range(n))
    start_torch = tuple(torch.tensor(state, requires_grad=True) for state in start)
    outputs_torch, carry_torch = run_torch(module, torch.tensor(X), start_torch if n == 2 else start_torch[0])
    value(outputs_torch, carry_torch).backward()
    params = to_flax(module.named_parameters())

    def loss(start):
        outputs, carry = model.apply({"params": params}, X, lengths=LENGTHS, carry=start)
        return value(outputs, carry), outputs

    (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(start)
    np.testing.assert_allclose(outputs, outputs_torch.detach().numpy(), rtol=1e-9, atol=1e-12)
    for grad, state in zip(grads, start_torch, strict=True):
        np.testing.assert_allclose(grad, state.grad.numpy(), rtol=1e-8, atol=1e-11)
        assert np.abs(grad).max() > 1e-3


@pytest.mark.parametrize(
    ("tx", "make_optimizer"),
    [
        (optax.sgd(0.01), lambda parameters: torch.optim.SGD(parameters, lr=0.01)),
        (
            optax.adamw(0.01, weight_decay=0.1),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_training(cell, tx, make_optimizer):
    module, model = make_torch(cell, 2, True), make_ours(cell, 2, True)
    params = to_flax(module.named_parameters())
    optimizer, state, losses = make_optimizer(module.parameters()), tx.init(params), []

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            outputs, _ = model.apply({"params": params}, X, lengths=LENGTHS, train=True)
            return ((outputs - 0.3) ** 2).sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(3):
        optimizer.zero_grad()
        loss_torch = ((run_torch(module, torch.tensor(X))[0] - 0.3) ** 2).sum()
        loss_torch.backward()
        optimizer.step()
        params, state, loss = step(params, state)
        np.testing.assert_allclose(loss, loss_torch.item(), rtol=1e-9)
        losses.append(float(loss))
    assert_same(params, to_flax(module.named_parameters()), "after 3 steps")
    assert losses[0] > losses[1] > losses[2]
