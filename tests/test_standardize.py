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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("distance", [0.0, 10.0, 100.0])
def test_one_pass_loses_no_more_than_the_input_has_lost(distance, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((50, 768)) + distance, dtype)
    wide = np.asarray(x, np.float64)
    around = wide - wide.mean(-1, keepdims=True)
    expected = around / np.sqrt((around**2).mean(-1, keepdims=True) + 1e-5)
    step_of_input = np.spacing(np.asarray(x)).astype(np.float64).max()
    np.testing.assert_allclose(standardized(x, 1e-5, is_centered=True), expected, atol=max(1e-5, 0.1 * step_of_input))


def test_a_row_of_one_value_is_0(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.full((3, 768), 0.1, jnp.bfloat16)
    assert jnp.abs(standardized(x, 1e-5, is_centered=True)).max() < 1e-3
    assert jnp.isfinite(jax.grad(lambda x: jnp.sum(standardized(x, 0.01, is_centered=True) ** 2))(x)).all()


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
