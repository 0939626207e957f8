import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxdl.models import activation_gpu
from jaxdl.models.layers import make_activation

X = np.linspace(-8, 8, 2001)


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


CASES = [("gelu", gelu), ("gelu_tanh", gelu_tanh)]


@pytest.mark.parametrize(("name", "exact"), CASES)
def test_values_and_slopes_against_float64(name, exact):
    fn = getattr(activation_gpu, name)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(fn(x), exact(X), atol=2e-6)
    slopes = (exact(X + 1e-5) - exact(X - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.vmap(jax.grad(fn))(x), slopes, atol=2e-6)
    np.testing.assert_allclose(jax.jvp(fn, (x,), (2 * x,))[1], 2 * X * slopes, atol=2e-5)
    curvature = jax.vmap(jax.grad(jax.grad(fn)))(jnp.asarray([0.0, 1.0, -2.0]))
    ours = jax.vmap(jax.grad(jax.grad(lambda y: nn.gelu(y, approximate=name != "gelu"))))(jnp.asarray([0.0, 1.0, -2.0]))
    np.testing.assert_allclose(curvature, ours, atol=1e-5)


@pytest.mark.parametrize(("name", "exact"), CASES)
def test_a_gpu_rounds_to_bfloat16_once_and_shares_nothing_dear(name, exact, monkeypatch):
    x = jnp.asarray(X, jnp.bfloat16)
    plain = make_activation(name)(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fn = make_activation(name)
    wide = exact(np.asarray(x, np.float64))
    np.testing.assert_allclose(np.asarray(fn(x), np.float64), wide, rtol=2**-8, atol=1e-6)
    assert np.abs(np.asarray(plain, np.float64) - wide).max() > np.abs(np.asarray(fn(x), np.float64) - wide).max()
    text = str(jax.make_jaxpr(lambda x: jax.value_and_grad(lambda y: jnp.sum(fn(y).astype(jnp.float32)))(x))(x))
    assert [text.count(f"= {dear} ") for dear in ("tanh", "logistic", "erf", "erfc")] in ([0, 2, 0, 0], [0, 0, 2, 0])
    factors = [
        float(re.search(rf"\b{argument}:\S+ = mul (?:\w+ )?(-?[\d.]+):", text)[1])
        for argument in re.findall(r"= (?:logistic|erf) (\w+)", text)
    ]
    assert factors[0] == -factors[1]  # the same argument would be one array for both
    assert str(jax.make_jaxpr(fn)(x.astype(jnp.float32))).count("custom_jvp_call") == 0
