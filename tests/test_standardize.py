import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models.block import Block
from jaxdl.models.embedding import Embed
from jaxdl.models.standardize import standardized

X = np.random.default_rng(0).standard_normal((5, 16)) * 3 + 2


@pytest.mark.parametrize("is_centered", [True, False])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_values_and_gradients_against_float64(platform, is_centered, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.asarray(X, jnp.bfloat16)
    wide, weight = np.asarray(x, np.float64), np.random.default_rng(1).standard_normal((5, 16))
    around = wide - (wide.mean(-1, keepdims=True) if is_centered else 0)
    rate = 1 / np.sqrt((around**2).mean(-1, keepdims=True) + 1e-5)
    expected = around * rate
    of_rate = weight - expected * (weight * expected).mean(-1, keepdims=True)
    slope = rate * (of_rate - (weight.mean(-1, keepdims=True) if is_centered else 0))

    def total(y):
        return jnp.sum(standardized(y, 1e-5, is_centered=is_centered) * jnp.asarray(weight, jnp.float32))

    np.testing.assert_allclose(standardized(x, 1e-5, is_centered=is_centered), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x).astype(jnp.float32), slope, atol=2e-3)
    along = jax.jvp(total, (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(along, slope.sum(), atol=1e-4)
    assert ("optimization_barrier" in str(jax.make_jaxpr(total)(x))) == (platform == "gpu")


def test_gradients_of_tokens_are_summed_in_float32():
    """A sum of ones in bfloat16 would stop at 256."""
    embed = Embed(Block(width=8, n_heads=2, hidden=8, dtype=jnp.bfloat16), vocab_size=3, n_token_types=2)
    tokens = jnp.ones((1, 1000), jnp.int32)
    params = embed.init(jax.random.key(0), tokens, jnp.zeros((1, 1), jnp.int32))["params"]

    def total(params):
        out = embed.apply({"params": params}, tokens, jnp.zeros((1, 1), jnp.int32))
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32))

    grads = jax.grad(total)(params)
    assert grads["token"]["embedding"][1].tolist() == [1000.0] * 8
    assert grads["token_type"]["embedding"].tolist() == [[1000.0] * 8, [0.0] * 8]
