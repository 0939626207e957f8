import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models.apart import apart, product_apart


@pytest.mark.parametrize(
    ("platform", "dtype", "n_barriers"), [("gpu", "bfloat16", 1), ("gpu", "float32", 0), ("cpu", "bfloat16", 0)]
)
def test_half_precision_on_a_gpu_has_a_barrier_and_its_gradient_none(platform, dtype, n_barriers, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x, kernel = jnp.ones((2, 3, 4), dtype), jnp.arange(8, dtype=dtype).reshape(4, 2)

    def total(x, kernel):
        return jnp.sum(apart(product_apart(x, kernel)).astype(jnp.float32) ** 2)

    np.testing.assert_array_equal(product_apart(x, kernel), x @ kernel)
    assert str(jax.make_jaxpr(lambda x: apart(x))(x)).count("= optimization_barrier") == n_barriers
    both = jax.value_and_grad(total, argnums=(0, 1))
    assert str(jax.make_jaxpr(both)(x, kernel)).count("= optimization_barrier") == 2 * n_barriers
    value, grads = jax.jit(both)(x, kernel)
    assert float(value) == 6 * (12**2 + 16**2)
    np.testing.assert_array_equal(grads[1], np.full((4, 2), [6 * 2 * 12.0, 6 * 2 * 16.0]))
