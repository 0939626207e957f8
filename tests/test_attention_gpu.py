"""What cuDNN's attention is asked for, with a stand-in that computes it: there is no GPU here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models.attention import Sight, attend
from jaxdl.models.checks import ModelError
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.transformer import Stack
from jaxdl.models.vit import ViT, vit_block

RNG = np.random.default_rng(0)


@pytest.fixture
def calls(monkeypatch):
    """The options of each call of the stand-in, which refuses what JAX's binding of cuDNN refuses in training."""
    real, found = jax.nn.dot_product_attention, []

    def stand_in(query, key, value, *, implementation, **options):
        T, S = query.shape[1], key.shape[1]
        assert implementation == "cudnn"
        assert T % 2 == S % 2 == 0
        for part in (options["mask"], options["bias"]):
            assert part is None or part.shape[2:] == (T, S)
        found.append(options)
        return real(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return found


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("case", ["causal", "causal, padded", "padded", "causal, bias", "bias", "all"])
def test_values_and_gradients_are_those_of_the_plain_computation(case, n, calls, monkeypatch):
    q, k, v, weight = (jnp.asarray(RNG.standard_normal((2, n, 2, 8)), jnp.bfloat16) for _ in range(4))
    key_mask = jnp.arange(n)[None] < jnp.array([[n], [2]]) if "padded" in case else None
    is_causal = "causal" in case
    mask = Sight(jnp.arange(n), jnp.arange(n), key_mask).mask(is_causal=is_causal, window=None)
    bias = jnp.asarray(RNG.standard_normal((1, 2, n, n)), jnp.bfloat16) if "bias" in case else None
    is_only = case in ("causal", "causal, bias")

    def loss(q, k, v):
        out = attend(q, k, v, mask=mask, bias=bias, scale=0.3, is_causal=is_causal, is_only_causal=is_only)
        return jnp.sum((out * weight).astype(jnp.float32)), out

    plain = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert not calls
    as_on_a_gpu(monkeypatch)
    jax.clear_caches()  # the platform is no part of a traced function's key
    found = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert calls[0]["is_causal"] == is_only
    assert (calls[0]["mask"] is None) == (is_only or mask is None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.04)


def test_a_decoder_says_whether_its_mask_hides_more_than_the_future(calls, monkeypatch):
    tokens = jnp.ones((1, 4), jnp.int32)
    cases = {"plain": ({}, {}), "padded": ({}, {"mask": tokens}), "packed": ({}, {"documents": tokens})}
    cases["window"] = ({"window": 2}, {})
    for name, (fields, inputs) in cases.items():
        block = gpt2_block(width=16, n_heads=2, dtype=jnp.bfloat16, **fields)
        model = GPT2(block, n_layers=1, vocab_size=5, n_positions=4)
        variables = model.init(jax.random.key(0), tokens)
        with monkeypatch.context() as patch:
            as_on_a_gpu(patch)
            model.apply(variables, tokens, **inputs)
        assert (calls[-1]["is_causal"], calls[-1]["mask"] is None) == (name == "plain",) * 2, name
    assert len(calls) == len(cases)


def test_a_vision_transformer_adds_a_token_once_and_nobody_sees_it(calls, monkeypatch):
    model = ViT(vit_block(16, 2, 32, dtype=jnp.bfloat16), n_layers=2, image_size=4, patch_size=2, head="pool")
    image = jnp.asarray(RNG.standard_normal((3, 4, 4, 3)), jnp.float32)
    variables = model.init(jax.random.key(0), image)

    def loss(variables):
        hidden = model.apply(variables, image, method="hidden")
        return jnp.sum(hidden.astype(jnp.float32) ** 2) / 100, hidden

    plain = jax.jit(jax.grad(loss, has_aux=True))(variables)
    as_on_a_gpu(monkeypatch)
    jax.clear_caches()
    found = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert [call["key_value_seq_lengths"].shape for call in calls] == [(3,)] * 2
    assert found[1].shape == (3, 5, 16)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.06, rtol=0.05)


@pytest.mark.parametrize("is_causal", [True, False])
def test_lengths_say_what_a_mask_of_padding_on_the_right_says(is_causal, calls, monkeypatch):
    block = gpt2_block(width=16, n_heads=2, dtype=jnp.bfloat16, is_causal=is_causal)
    stack, lengths = Stack((block,)), jnp.array([4, 2])
    x = jnp.asarray(RNG.standard_normal((2, 4, 16)), jnp.bfloat16)
    variables = stack.init(jax.random.key(0), x)
    mask = jnp.arange(4)[None] < lengths[:, None]
    masked, by_lengths = stack.apply(variables, x, mask=mask)[0], stack.apply(variables, x, lengths=lengths)[0]
    np.testing.assert_array_equal(masked[mask], by_lengths[mask])
    assert not bool(jnp.all(masked[mask] == stack.apply(variables, x)[0][mask])) or is_causal
    as_on_a_gpu(monkeypatch)
    on_gpu = stack.apply(variables, x, lengths=lengths)[0]
    assert calls[0]["mask"] is None
    assert calls[0]["is_causal"] == is_causal
    np.testing.assert_allclose(*(y[mask].astype(jnp.float32) for y in (on_gpu, masked)), atol=0.04)


def test_lengths_with_a_cache_are_refused():
    stack, x = Stack((gpt2_block(width=16, n_heads=2),)), jnp.ones((1, 2, 16))
    variables = stack.init(jax.random.key(0), x)
    with pytest.raises(ModelError, match="lengths are for calls without a cache"):
        stack.apply(variables, x, lengths=jnp.array([2]), cache={"layers": {}})
