"""Bottleneck adapters: nothing at the start, the formula in NumPy, stacked layers, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxdl import paths
from jaxdl.finetune.adapters import AdapterError, adapted, add
from jaxdl.finetune.bottleneck import Bottleneck
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.transformer import stack_layers, unstack_layers
from jaxdl.paths import flatten

KEY = jax.random.key(0)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
HOULSBY = Bottleneck([(".*/(attention/output|mlp/down)", 3), (".*", None)])


def gpt2(**fields):
    block = gpt2_block(width=8, n_heads=2, init_std=0.4)
    return GPT2(block, n_layers=2, vocab_size=11, n_positions=8, **{"layout": "unrolled", **fields})


def filled(model, *inputs):
    """Parameters of every kind of value, without a compilation of the model's own draws."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.4, leaf.shape), jnp.float32), shapes)


def create(model, settings=HOULSBY):
    return add(jax.random.key(1), filled(model, TOKENS), settings, model, TOKENS)


def moved(params):
    adapters = jax.tree.map(lambda x: x + 0.1 * jnp.cos(1.7 * jnp.arange(x.size)).reshape(x.shape), params["adapters"])
    return {**params, "adapters": adapters}


def value_and_gradient(model, params, settings=HOULSBY):
    def loss(params):
        y = adapted(model.apply, settings)({"params": params}, TOKENS)
        return y[..., 3].sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return y, gradient["adapters"]


def test_fresh_adapters_change_no_bit_and_only_up_has_a_gradient():
    model = gpt2()
    params = create(model)
    base = {name: tree for name, tree in params.items() if name != "adapters"}
    y, gradient = value_and_gradient(model, params)
    np.testing.assert_array_equal(y, jax.jit(model.apply)({"params": base}, TOKENS))
    for path, leaf in flatten(gradient).items():
        assert ("/up_" in path) == bool(np.abs(leaf).max() > 0), path


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_formula(activation):
    model, settings, x = nn.Dense(4), Bottleneck([("", 2)], activation=activation), jnp.arange(6.0).reshape(2, 3) / 5
    params = moved(add(KEY, model.init(KEY, x)["params"], settings, model, x))
    y = adapted(model.apply, settings)({"params": params}, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h, own = np.asarray(x, np.float64) @ wide["kernel"] + wide["bias"], wide["adapters"]
    low = h @ own["down_kernel"] + own["down_bias"]
    low = np.maximum(low, 0) if activation == "relu" else low * (1 + erf(low / np.sqrt(2))) / 2
    np.testing.assert_allclose(y, h + low @ own["up_kernel"] + own["up_bias"], rtol=1e-5, atol=1e-6)
    assert np.abs(y - h).max() > 0.1


def test_scanned_and_remat_are_the_plain_model():
    params = moved(create(gpt2()))
    scanned = gpt2(layout="scanned", remat="full")
    stacked = stack_layers(params)
    fresh = jax.eval_shape(lambda: create(scanned))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stacked)
    y, gradient = value_and_gradient(gpt2(), params)
    z, other = value_and_gradient(scanned, stacked)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
    other = unstack_layers(other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), gradient, other)


class Odd(nn.Module):
    """Modules of which none can have an adapter, but for the first."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=True, name="dropout")(nn.Dense(4, name="fine")(x))
        return Pair(name="pair")(x), Count(name="count")(x)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, nn.Dense(3, name="inner")(x)


class Count(nn.Module):
    @nn.compact
    def __call__(self, x):
        return (x + self.param("threshold", nn.initializers.zeros, (1, 1)) > 0).sum(axis=-1)


def test_refusals():
    x = jnp.ones((2, 3))
    base = Odd().init(KEY, x)["params"]
    with pytest.raises(AdapterError) as error:
        add(KEY, base, Bottleneck([("pair/inner", None), ("", None), (".*", 2)]), Odd(), x)
    for text in ("pair (Pair) gives several arrays", "count gives int32[2]", "dropout (Dropout) has no parameters"):
        assert text in str(error.value)
    assert "bottleneck: 3 problem(s)" in str(error.value)
    with pytest.raises(paths.RuleError, match="'fnie' matches nothing; nearest paths: fine"):
        add(KEY, base, Bottleneck([("fnie", 2), (".*", None)]), Odd(), x)
    with pytest.raises(AdapterError, match=r"(?s)2 problem.*activation='rleu'.*the width of 'fine'=0"):
        Bottleneck([("fine", 0)], activation="rleu")
