"""A convolution with gradients that are fast inside of loops: the numbers of XLA's own, in another layout."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdl import create_state, make_train_step, repeat
from jaxdl.models import convolution as convolution_module
from jaxdl.models.convolution import convolution
from tests import small_networks

pytestmark = pytest.mark.optimized

LAYOUT = ("NHWC", "HWIO", "NHWC")


def reference(x, kernel, strides, pads):
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=LAYOUT)


def check_against_xla(size, strides, reach, pad):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *size, 3), np.float32))
    kernel = jnp.asarray(rng.standard_normal((reach, reach, 3, 4), np.float32))
    pads = ((pad, pad), (pad, pad))
    if min(size) + 2 * pad < reach:
        pytest.skip("the kernel is larger than the image")
    ours, back = jax.vjp(lambda x, kernel: convolution(x, kernel, strides, pads), x, kernel)
    theirs, their_back = jax.vjp(lambda x, kernel: reference(x, kernel, strides, pads), x, kernel)
    np.testing.assert_array_equal(ours, theirs)
    dy = jnp.asarray(rng.standard_normal(ours.shape, np.float32))
    for mine, other in zip(back(dy), their_back(dy), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 5), (6, 9), (8, 7)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize(("reach", "pad"), [(1, 0), (3, 1), (2, 0), (7, 3), (4, 1)])
def test_values_and_gradients_are_those_of_xla(size, strides, reach, pad):
    check_against_xla(size, strides, reach, pad)


@pytest.mark.parametrize("strides", [(1, 1), (3, 2)])
@pytest.mark.parametrize(("reach", "pad"), [(1, 0), (3, 1), (2, 4)])
def test_the_gradient_of_a_kernel_is_the_sum_over_parts_of_the_rows(monkeypatch, strides, reach, pad):
    monkeypatch.setattr(convolution_module, "_NARROW", 0)
    monkeypatch.setattr(convolution_module, "_CACHED", 1)
    convolution_module._by_convolutions.clear_cache()
    check_against_xla((6, 9), strides, reach, pad)
    text = convolution_module._by_convolutions.lower(
        jnp.ones((2, 6, 6, 3)), jnp.ones((2, 6, 6, 4)), (3, 3), (1, 1), ((1, 1), (1, 1))
    ).as_text("hlo")
    assert len(re.findall(r" convolution\(", text)) == 6  # one for each row
    convolution_module._by_convolutions.clear_cache()


@pytest.mark.parametrize("options", [{"feature_group_count": 3}, {"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 2)}])
def test_what_is_not_plain_goes_to_xla_as_it_is(options):
    groups, pads = options.get("feature_group_count", 1), ((1, 0), (0, 1))
    x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3 // groups, 6))
    ours = convolution(x, kernel, (1, 1), pads, **options)
    theirs = lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=LAYOUT, **options)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_convolution_of_a_loop_has_another_layout(microbatches):
    task = small_networks.cnn()
    step = make_train_step(task.loss_fn, task.optimizer(), microbatches=microbatches)
    state = create_state(task.params, {}, task.optimizer(), rng=jax.random.key(0))
    batches = {name: np.stack([value, value]) for name, value in task.data.items()}
    text = jax.jit(repeat(step, 2)).lower(state, batches).as_text("hlo")
    layouts = re.findall(r"dim_labels=(\S+?)[,\s]", text)
    assert len(layouts) > 4
    assert set(layouts) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_module_of_flax_gets_it_with_its_own_words_for_padding(padding):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 8, 3), np.float32))
    ours = nn.Conv(4, (3, 3), 2, padding=padding, conv_general_dilated=convolution)
    theirs = nn.Conv(4, (3, 3), 2, padding=padding)
    params = theirs.init(jax.random.key(0), x)
    grads = [jax.grad(lambda params, m=m: (m.apply(params, x) ** 2).sum())(params) for m in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *grads)
    text = jax.jit(jax.grad(lambda params: (ours.apply(params, x) ** 2).sum())).lower(params).as_text("hlo")
    assert set(re.findall(r"dim_labels=(\S+?)[,\s]", text)) == {"b01f_01io->b01f"}
