"""Recurrent layers: masks, carries, dropout, cuDNN's layout, derivatives, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn as jax_rnn

from jaxdl.models.checks import ModelError
from jaxdl.models.recurrent import Recurrent
from jaxdl.models.recurrent_cells import CELLS, Cell, scan_cell
from jaxdl.models.recurrent_gpu import choose_implementation, cudnn_lstm, pack_lstm
from jaxdl.paths import flatten

pytestmark = pytest.mark.optimized

B, T, D, F = 3, 7, 4, 5
LENGTHS = np.array([7, 1, 4])
MASK = np.arange(T)[None] < LENGTHS[:, None]
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
NAMES = ["rnn", "rnn_relu", "lstm", "gru"]


def make(**options):
    """A model and variables without a zero in any bias."""
    model = Recurrent(width=F, **options)
    variables = model.init(jax.random.key(0), X)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return model, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), variables)


def total(outputs, carry):
    return sum((state**2).sum() for state in carry) + (outputs**3).sum()


@pytest.mark.parametrize("cell", NAMES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing_in_values_or_gradients(cell, bidirectional):
    model, variables = make(cell=cell, n_layers=2, bidirectional=bidirectional)

    @jax.jit
    def run(variables, x):
        def loss(variables, x):
            outputs, carry = model.apply(variables, x, mask=MASK)
            return total(outputs, carry), (outputs, carry)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)

    padded = np.where(MASK[..., None], X, np.nan).astype(np.float32)
    clean, dirty = run(variables, X), run(variables, padded)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    (_, (outputs, _)), (_, x_grad) = dirty
    assert (np.asarray(outputs)[~MASK] == 0).all()
    assert (np.asarray(x_grad)[~MASK] == 0).all()
    assert (np.abs(np.asarray(outputs)[MASK]).max(-1) > 0).all()


@pytest.mark.parametrize("cell", NAMES)
def test_a_row_alone_without_padding_gives_the_same(cell):
    model, variables = make(cell=cell, n_layers=2, bidirectional=True)
    outputs, carry = model.apply(variables, X, lengths=LENGTHS)
    for row, n in enumerate(LENGTHS):
        alone, alone_carry = model.apply(variables, X[row : row + 1, :n])
        np.testing.assert_allclose(outputs[row : row + 1, :n], alone, atol=1e-6)
        for a, b in zip(carry, alone_carry, strict=True):
            np.testing.assert_allclose(a[:, row : row + 1], b, atol=1e-6)


def test_a_mask_may_have_holes_and_equals_lengths_where_it_has_none():
    model, variables = make(cell="gru", bidirectional=True)
    holes = np.array([[1, 0, 1, 1, 0, 0, 1]] * B)
    outputs, carry = model.apply(variables, X, mask=holes)
    packed, packed_carry = model.apply(variables, X[:, holes[0] == 1])
    np.testing.assert_allclose(outputs[:, holes[0] == 1], packed, atol=1e-6)
    np.testing.assert_allclose(carry[0], packed_carry[0], atol=1e-6)
    by_mask, by_lengths = (model.apply(variables, X, **kw)[0] for kw in ({"mask": MASK}, {"lengths": LENGTHS}))
    np.testing.assert_array_equal(by_mask, by_lengths)


@pytest.mark.parametrize("cell", NAMES)
def test_two_pieces_with_a_carry_equal_one_run(cell):
    model, variables = make(cell=cell, n_layers=3)
    outputs, carry = model.apply(variables, X)
    first, middle = model.apply(variables, X[:, :3])
    second, last = model.apply(variables, X[:, 3:], carry=middle)
    np.testing.assert_allclose(np.concatenate([first, second], 1), outputs, atol=1e-6)
    for a, b in zip(last, carry, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not np.allclose(second, model.apply(variables, X[:, 3:])[0], atol=1e-3)


@pytest.mark.parametrize("variational", [False, True])
def test_variational_dropout_drops_the_same_values_at_all_times(variational):
    width = 64
    model = Recurrent(width=width, cell="rnn_relu", n_layers=2, dropout_rate=0.5, variational=variational)
    x = jnp.ones((2, 5, 1))
    variables = model.init(jax.random.key(0), x)
    one, zero = jnp.ones(width), jnp.zeros((width, width))
    side = {"kernel": zero, "bias": 0 * one}
    first = {"input": {"kernel": jnp.ones((1, width)), "bias": 0 * one}, "recurrent": side}
    second = {"input": {"kernel": jnp.eye(width), "bias": 0 * one}, "recurrent": side}
    params = {"layer_0": {"forward": first}, "layer_1": {"forward": second}}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    outputs, _ = model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(2)})
    assert set(np.unique(outputs).tolist()) == {0.0, 2.0}
    assert bool((outputs == outputs[:, :1]).all()) == variational
    assert not bool((outputs[0] == outputs[1]).all())
    np.testing.assert_array_equal(model.apply({"params": params}, x)[0], np.ones((2, 5, width)))


def squared_gradient(f):
    return lambda *args: sum((g**2).sum() for g in jax.grad(f, (0, 1, 2))(*args))


@pytest.mark.parametrize("cell", NAMES)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_written_derivatives_are_those_of_automatic_differentiation(cell, reverse):
    rule, rng = CELLS[cell], np.random.default_rng(3)
    n = len(rule.gate_biases) * F
    with jax.enable_x64(True):
        x, kernel, bias = (jnp.asarray(rng.normal(size=s)) for s in ((T, B, n), (F, n), (n,)))
        initial = tuple(jnp.asarray(rng.normal(size=(B, F))) for _ in range(rule.n_states))

        def plain(x, kernel, bias, initial):
            def step(old, t):
                x_BG, mask_B = t
                new, _ = rule.forward(x_BG, old[0] @ kernel + bias[None], old)
                new = tuple(jnp.where(mask_B[:, None], a, b) for a, b in zip(new, old, strict=True))
                return new, new[0]

            final, outputs = jax.lax.scan(step, initial, (x, MASK.T), reverse=reverse)
            return total(outputs, final)

        def ours(x, kernel, bias, initial):
            return total(*scan_cell(rule, reverse, x, kernel, bias, initial, jnp.asarray(MASK.T)))

        args = (x, kernel, bias, initial)
        for fn in (lambda f: f, squared_gradient):
            found, expected = (jax.grad(fn(f), (0, 1, 2, 3))(*args) for f in (ours, plain))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
                assert np.abs(a).max() > 1e-3


def test_a_cell_of_ones_own():
    cell = Cell(
        (0.5,),
        1,
        lambda x, h, old: ((old[0] + x + h,), ()),
        lambda saved, old, new, d_new: (d_new[0], d_new[0], d_new),
    )
    model = Recurrent(width=1, cell=cell)
    params = {
        "layer_0": {"forward": {k: {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)} for k in ("input", "recurrent")}}
    }
    x = jnp.ones((1, 3, 1))
    outputs, _ = model.apply({"params": params}, x)
    assert outputs[0, :, 0].tolist() == [1.0, 3.0, 7.0]
    grad = jax.grad(lambda x: model.apply({"params": params}, x)[0][0, -1, 0])(x)
    assert grad[0, :, 0].tolist() == [4.0, 2.0, 1.0]
    assert model.init(jax.random.key(0), x)["params"]["layer_0"]["forward"]["input"]["bias"].tolist() == [0.5]


def test_what_the_parameters_start_at():
    size = 16
    params = Recurrent(width=size).init(jax.random.key(0), X)["params"]["layer_0"]["forward"]
    assert params["input"]["bias"].tolist() == [0.0] * size + [1.0] * size + [0.0] * 2 * size
    assert params["recurrent"]["bias"].tolist() == [0.0] * 4 * size
    for gate in np.split(params["recurrent"]["kernel"], 4, 1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(size), atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_cudnns_layout_gives_the_same_values_and_gradients(bidirectional):
    """The packed vector, unpacked by JAX's own reference implementation of cuDNN's LSTM."""
    model, variables = make(cell="lstm", n_layers=2, bidirectional=bidirectional)

    def reference(x, h, c, weights, lengths, n_inputs, width, n_layers, dropout, is_bidirectional):
        parts = jax_rnn.unpack_lstm_weights(weights, n_inputs, width, n_layers, is_bidirectional)
        return jax_rnn.lstm_ref(x, h, c, *parts, lengths, n_inputs, width, n_layers, dropout, is_bidirectional)

    rng, shape = np.random.default_rng(5), model.zero_carry(B)[0].shape
    start = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    start = model.zero_carry(B) if bidirectional else start

    def by_cudnn(params, x):
        return cudnn_lstm(params, x, jnp.asarray(LENGTHS), start, lstm=reference)

    def by_scan(params, x):
        carry = None if bidirectional else start
        return model.apply({"params": params}, x, lengths=LENGTHS, carry=carry)

    x = jnp.where(MASK[..., None], X, 0)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, x, f=f: (total(*f(p, x)), f(p, x)), (0, 1), has_aux=True))(
            variables["params"], x
        )
        for f in (by_cudnn, by_scan)
    )
    for (path, a), b in zip(flatten(found[1][0]).items(), flatten(expected[1][0]).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=path)
        assert np.abs(a).max() > 1e-3, path
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    n_values = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert pack_lstm(variables["params"]).shape == (n_values,)
    assert n_values == jax_rnn.get_num_params_in_lstm(D, F, 2, bidirectional)


def choose(wanted="auto", cell="lstm", dtype=jnp.float32, has_mask=False, platform="cuda 13000", n_devices=1):
    return choose_implementation(
        wanted, cell=cell, dtype=dtype, has_mask=has_mask, platform=platform, n_devices=n_devices
    )


def test_the_choice_of_an_implementation_says_why():
    assert choose().name == "cudnn"
    assert choose(cell=CELLS["lstm"]).name == "cudnn"
    assert choose(wanted="cudnn", n_devices=8).name == "cudnn"
    for options, word in [
        ({"cell": "gru"}, "LSTM only"),
        ({"dtype": jnp.bfloat16}, "float32 only, not bfloat16"),
        ({"has_mask": True}, "may have holes"),
        ({"platform": "cpu"}, "no NVIDIA GPU"),
        ({"platform": "rocm 6"}, "no NVIDIA GPU"),
        ({"n_devices": 8}, "several devices"),
        ({"wanted": "scan"}, "asked for"),
    ]:
        choice = choose(**options)
        assert choice.name == "scan"
        assert word in choice.reason
    with pytest.raises(ModelError, match=r"2 problem.*\n.*LSTM only.*\n.*no NVIDIA"):
        choose(wanted="cudnn", cell="gru", platform="cpu")
    assert choose_implementation("auto", cell="lstm", dtype=jnp.float32, has_mask=False).name == "scan"


def test_the_choice_is_logged_once(caplog):
    model, variables = make(cell="rnn")
    with caplog.at_level("INFO", logger="jaxdl"):
        for _ in range(3):
            model.apply(variables, X)
    assert sum("recurrent layers" in record.getMessage() for record in caplog.records) <= 1


def test_low_precision_products_with_float32_states():
    model, variables = make(cell="lstm", n_layers=2)
    half = model.clone(dtype=jnp.bfloat16)
    outputs, carry = half.apply(variables, X, lengths=LENGTHS)
    assert outputs.dtype == jnp.bfloat16
    assert {state.dtype for state in carry} == {jnp.dtype("float32")}
    np.testing.assert_allclose(outputs.astype(jnp.float32), model.apply(variables, X, lengths=LENGTHS)[0], atol=0.03)
    grads = jax.grad(lambda v: half.apply(v, X)[0].astype(jnp.float32).sum())(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_a_batch_spread_over_devices_gives_the_same():
    model, variables = make(cell="lstm", bidirectional=True)
    x = np.tile(X, (8, 1, 1))[:8]
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    grad = jax.jit(jax.grad(lambda v, x: (model.apply(v, x)[0] ** 2).sum()))
    for a, b in zip(jax.tree.leaves(grad(variables, spread)), jax.tree.leaves(grad(variables, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_fields_that_make_no_network_are_refused_at_once():
    with pytest.raises(ModelError) as caught:
        Recurrent(width=0, cell="lsmt", n_layers=1, dropout_rate=0.5, implementation="cuddn")
    text = str(caught.value)
    for part in ("width=0", "did you mean 'lstm'", "n_layers=1 has no between", "did you mean 'cudnn'"):
        assert part in text, text
    with pytest.raises(ModelError, match="cell="):
        Recurrent(width=3, cell=jnp.tanh)


def test_calls_that_do_not_fit_are_refused_at_once():
    model, variables = make(cell="lstm", bidirectional=True)
    with pytest.raises(ModelError) as caught:
        model.apply(
            variables, X.astype(int), mask=MASK[:, 1:], lengths=np.array([0, 9, 2]), carry=(jnp.zeros((1, B, F)),)
        )
    text = str(caught.value)
    for part in (
        "inputs are int64; embed tokens first",
        "both mask and lengths",
        "mask has shape (3, 6)",
        "lengths [0, 9] of rows [0, 1] are not in 1..7",
        "carry is shapes [(1, 3, 5)]; it must be a tuple of arrays of shapes [(2, 3, 5), (2, 3, 5)]",
        "a bidirectional stack takes no carry",
    ):
        assert part in text, text
    for shape in [(T, D), (B, 0, D), (B, T, D, 1)]:
        with pytest.raises(ModelError, match="must be \\(batch, time, features\\)"):
            model.apply(variables, jnp.zeros(shape))
