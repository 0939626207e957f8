"""Ring attention: plain attention, whole or cut over devices, in values, gradients and training."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import make_train_step
from jaxdl.choices import tell
from jaxdl.models import ModelError
from jaxdl.models.attention import Sight, attend
from jaxdl.models.block import Block
from jaxdl.models.positions import alibi_slopes, distances
from jaxdl.models.transformer import Stack
from jaxdl.parallel import jit_step, make_mesh, state_shardings
from jaxdl.parallel.ring import Ends, Rule, ring_attention
from tests import small_networks

pytestmark = pytest.mark.optimized

B, T, H, K = 2, 16, 4, 3
RNG = np.random.default_rng(0)


def sequences(n_groups=H, length=T, dtype=np.float32):
    shapes = (B, length, H, K), (B, length, n_groups, K), (B, length, n_groups, K)
    return tuple(jnp.asarray(RNG.standard_normal(shape), dtype) for shape in shapes)


PADDING = jnp.arange(T)[None] < jnp.array([[11], [16]])
DOCUMENTS = jnp.asarray(np.sort(RNG.integers(0, 4, (B, T))))
CASES = {
    "all": {},
    "causal": {"is_causal": True},
    "padding": {"mask": PADDING},
    "causal padding on the left": {"is_causal": True, "mask": ~PADDING},
    "documents": {"is_causal": True, "documents": DOCUMENTS},
    "window": {"is_causal": True, "window": 5},
    "softcap": {"is_causal": True, "softcap": 0.5, "mask": PADDING},
    "grouped": {"is_causal": True, "n_groups": 2},
    "multi-query with ALiBi": {"is_causal": True, "n_groups": 1, "has_alibi": True},
}


def ways(mesh, *, is_causal=False, window=None, softcap=None, mask=None, documents=None, has_alibi=False, length=T):
    """Two functions of (query, key, value): the ring, and plain attention on one device."""
    slots, slopes = jnp.arange(length), jnp.asarray(alibi_slopes(H)) if has_alibi else None
    sight = Sight(slots, slots, mask, documents, documents)

    def ring(query, key, value):
        rule = Rule(0.7, is_causal, window, softcap)
        ends = Ends(slots, None, documents), Ends(slots, mask, documents)
        return ring_attention(query, key, value, mesh=mesh, rule=rule, queries=ends[0], keys=ends[1], slopes_H=slopes)

    def plain(query, key, value):
        bias = None if slopes is None else -slopes[None, :, None, None] * jnp.abs(distances(slots, slots))[None, None]
        seen = sight.mask(is_causal=is_causal, window=window)
        return attend(query, key, value, mask=seen, bias=bias, scale=0.7, softcap=softcap, implementation="xla")

    return ring, plain


def with_gradients(fn, weight):
    def total(*args):
        out = fn(*args)
        return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("axes", [{"sequence": 8}, {"data": 2, "sequence": 2, "model": 2}], ids=["8", "2x2x2"])
def test_the_ring_is_plain_attention_in_values_and_gradients(case, axes):
    options = dict(CASES[case])
    args = sequences(options.pop("n_groups", H))
    weight = jnp.asarray(RNG.standard_normal((B, T, H, K)), jnp.float32)
    ring, plain = ways(make_mesh(**axes), **options)
    (_, ours), our_grads = with_gradients(ring, weight)(*args)
    (_, theirs), their_grads = with_gradients(plain, weight)(*args)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_ring_is_the_softmax_of_numpy():
    query, key, value = sequences()
    ring, _ = ways(make_mesh(sequence=8), is_causal=True)
    scores = 0.7 * np.einsum("bthk,bshk->bhts", query, key, dtype=np.float64)
    scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshk->bthk", shares / shares.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(jax.jit(ring)(query, key, value), expected, rtol=1e-5, atol=1e-6)


def test_a_query_sees_nothing_of_a_hidden_token():
    """The gradient with respect to a hidden key and value is an exact zero."""
    query, key, value = sequences()
    ring, _ = ways(make_mesh(sequence=4), is_causal=True)
    grads = jax.jit(jax.grad(lambda k, v: jnp.sum(ring(query, k, v)[:, :6] ** 2), (0, 1)))(key, value)
    for grad in grads:
        assert np.all(np.asarray(grad)[:, 6:] == 0)
        assert np.any(np.asarray(grad)[:, :6] != 0)


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    query, key, value = sequences(dtype=jnp.bfloat16)
    ring, plain = ways(make_mesh(sequence=8), is_causal=True)
    ours, theirs = jax.jit(ring)(query, key, value), jax.jit(plain)(query, key, value)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=0.03)


# ---- what the compiler makes of it ----


def test_no_device_holds_all_keys_or_a_square_of_scores():
    """No array of a device has a dimension of the whole sequence, in the forward or the backward pass."""
    length, mesh = 8 * 13, make_mesh(sequence=8)
    args = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "sequence"))) for x in sequences(length=length)]
    ring, plain = ways(mesh, is_causal=True, length=length)
    weight = jnp.float32(1)
    shapes = shapes_of(with_gradients(ring, weight).lower(*args).compile().as_text())
    assert (B, 13, H, K) in shapes
    assert not [shape for shape in shapes if length in shape or max(shape, default=0) > length]
    square = shapes_of(with_gradients(plain, weight).lower(*args).compile().as_text())
    assert [shape for shape in square if shape[-1:] == (length,)]


def shapes_of(text):
    """Of every float array in a compiled program."""
    found = set(re.findall(r"\b(?:f32|bf16|f64)\[([\d,]*)\]", text))
    return [tuple(int(n) for n in shape.split(",") if n) for shape in found]


# ---- in a network ----

BLOCK = Block(width=8, n_heads=2, hidden=16, is_causal=True)


def losses_of(task, mesh, shardings=None):
    step, state, losses = make_train_step(task.loss_fn, task.optimizer()), task.state(), []
    run = jax.jit(step) if mesh is None else jit_step(step, mesh, state_shardings([(".*", None)], state, mesh))
    for _ in range(20):
        state, metrics = run(state, task.data)
        losses.append(float(metrics["loss"].finish()))
    return losses


def test_a_gpt_trains_alike_on_a_ring_and_says_that_it_does(caplog):
    tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="jaxdl"):
        ours = losses_of(small_networks.gpt(), make_mesh(data=2, sequence=4))
    assert "attention: ring (the axis 'sequence' of the mesh has 4 devices)" in caplog.text
    theirs = losses_of(small_networks.gpt(), None)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[-1] < ours[0]


def run_stack(block, *, length=8, n_rows=2, train=False, mesh=None):
    x = jnp.asarray(RNG.standard_normal((n_rows, length, 8)), jnp.float32)
    model = Stack((block,))
    variables = model.init(jax.random.key(0), x)
    fn = jax.jit(lambda x: model.apply(variables, x, train=train, rngs={"dropout": jax.random.key(1)})[0])
    if mesh is None:
        return x, fn(x)
    with jax.set_mesh(mesh):
        return x, fn(x)


def test_without_a_mesh_a_ring_is_what_one_device_does():
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    _, plain = run_stack(BLOCK)
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    _, ring = run_stack(BLOCK.replace(attention="ring"))
    np.testing.assert_array_equal(plain, ring)


def test_a_mesh_in_scope_makes_a_ring():
    mesh = make_mesh(data=2, sequence=4)
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    _, plain = run_stack(BLOCK)
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    _, ring = run_stack(BLOCK.replace(attention="ring"), mesh=mesh)
    np.testing.assert_allclose(plain, ring, rtol=1e-5, atol=1e-6)


def test_what_a_ring_cannot_do():
    mesh = make_mesh(data=2, sequence=4)
    dropped = BLOCK.replace(attention="ring", attention_dropout_rate=0.1)
    with pytest.raises(ModelError, match="10 tokens do not divide over the 4 devices of the axis 'sequence'"):
        run_stack(BLOCK.replace(attention="ring"), length=10, mesh=mesh)
    with pytest.raises(ModelError, match=r"3 rows do not divide.*; probabilities are dropped out\. Use 'auto'"):
        run_stack(dropped, n_rows=3, train=True, mesh=mesh)
    run_stack(dropped.replace(attention="auto"), train=True, mesh=mesh)
