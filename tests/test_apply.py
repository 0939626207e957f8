import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.models.apply import init_model

KERNEL = "jax_threefry_gpu_kernel_lowering"


class Noted(nn.Module):
    """Notes the setting that its parameters are drawn under."""

    @nn.compact
    def __call__(self, x):
        seen.append(getattr(jax.config, KERNEL))
        return x * self.param("scale", nn.initializers.normal(), (1, 4))


seen: list[bool] = []


def test_random_bits_are_a_kernel_s_where_nothing_cuts_them():
    key, x = jax.random.key(3), jnp.ones((1, 4))
    params, _ = init_model(Noted(), key, x)
    shapes, _ = jax.eval_shape(lambda key: init_model(Noted(), key, x), key)
    assert (seen, getattr(jax.config, KERNEL)) == ([True, False], False)  # drawn, and traced for its shapes alone
    np.testing.assert_array_equal(params["scale"], jax.jit(Noted().init)(key, x)["params"]["scale"])
    assert shapes["scale"].shape == (1, 4)
