"""Convolutions with fewer multiplications: NumPy's numbers in float64, on any size, padding, group and device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl.models import convolution as convolution_module
from jaxdl.models import winograd
from jaxdl.models.convolution import convolution
from jaxdl.parallel import make_mesh

pytestmark = pytest.mark.optimized

SAME = ((1, 1), (1, 1))


@pytest.fixture
def small_groups(monkeypatch):
    """Two images of 6 x 6 with 128 channels at a time."""
    for name in ("_CACHED", "_CACHED_MAPPED"):
        monkeypatch.setattr(winograd, name, 2 * 16 * 9 * 128 * 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


def arrays(size, n_in=128, n_out=128, n_images=8, pads=SAME):
    rng = np.random.default_rng(0)
    height, width = (n + sum(pad) - 2 for n, pad in zip(size, pads, strict=True))
    x = rng.standard_normal((n_images, *size, n_in))
    return x, rng.standard_normal((3, 3, n_in, n_out)) / 3, rng.standard_normal((n_images, height, width, n_out))


def by_definition(x, kernel, dy, pads):
    """Convolution, and its gradients along dy, tap by tap in float64."""
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = dy.shape[1:3]
    y, dx, dk = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            met = padded[:, i : i + height, j : j + width]
            y += met @ kernel[i, j]
            dx[:, i : i + height, j : j + width] += dy @ kernel[i, j].T
            dk[i, j] = np.einsum("bhwc,bhwo->co", met, dy)
    (top, _), (left, _) = pads
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dk


def with_gradients(x, kernel, dy, pads):
    y, back = jax.vjp(lambda x, kernel: convolution(x, kernel, (1, 1), pads), x, kernel)
    return y, *back(dy)


def primitives(x, kernel, dy, pads=SAME, strides=(1, 1)):
    def both(x, kernel, dy):
        return jax.vjp(lambda x, kernel: convolution(x, kernel, strides, pads), x, kernel)[1](dy)

    return str(jax.make_jaxpr(both)(x, kernel, dy))


def check(size, pads, dtype, tolerance):
    numbers = arrays(size, pads=pads)
    expected = by_definition(*numbers, pads)
    found = with_gradients(*(jnp.asarray(part, dtype) for part in numbers), pads)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert np.abs(theirs).max() > 1
        assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (4, 9)])
@pytest.mark.parametrize("pads", [SAME, ((0, 0), (0, 0)), ((2, 0), (0, 1)), ((3, 4), (3, 3))])
def test_values_and_gradients_are_those_of_the_definition(size, pads):
    check(size, pads, jnp.float32, 2e-6)
    assert "conv_general_dilated" not in primitives(*arrays(size, pads=pads), pads)


def test_the_rule_is_exact_but_for_rounding():
    with jax.enable_x64(True):
        check((7, 6), SAME, jnp.float64, 1e-14)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("size", [(6, 6), (5, 6)])
def test_groups_of_images_give_the_same(size):
    assert "length=4" in primitives(*arrays(size))
    check(size, SAME, jnp.float32, 2e-6)


def test_rounding_is_about_that_of_the_direct_convolution():
    x, kernel, dy = arrays((16, 16))
    exact = by_definition(x, kernel, dy, SAME)[0]
    singles = [jnp.asarray(part, jnp.float32) for part in (x, kernel)]
    direct = jax.lax.conv_general_dilated(*singles, (1, 1), SAME, dimension_numbers=convolution_module._LAYOUT)
    ours, theirs = (np.abs(y - exact).max() for y in (convolution(*singles, (1, 1), SAME), direct))
    assert 0 < ours < 6 * theirs


@pytest.mark.parametrize("case", ["narrow", "few", "strided", "half", "wider kernel"])
def test_elsewhere_xla_convolves(case):
    x, kernel, dy = arrays((6, 6), n_in=16 if case == "narrow" else 128, n_images=2 if case == "few" else 8)
    strides = (2, 2) if case == "strided" else (1, 1)
    if case == "strided":
        dy = dy[:, ::2, ::2]
    if case == "wider kernel":
        kernel, dy = np.concatenate([kernel, kernel[:1]]), dy[:, 1:]
    dtype = jnp.bfloat16 if case == "half" else jnp.float32
    assert "conv_general_dilated" in primitives(*(jnp.asarray(part, dtype) for part in (x, kernel, dy)), SAME, strides)


def test_a_narrower_layer_has_it_without_the_gradient_of_the_kernel():
    text = primitives(*(jnp.asarray(part, jnp.float32) for part in arrays((6, 6), 64, 64)))
    assert "name=convolve" in text
    assert "gradient_of_kernel" not in text


@pytest.mark.usefixtures("small_groups")
def test_mapped_over_devices_groups_follow_one_another_and_give_the_same():
    numbers = [jnp.asarray(part, jnp.float32) for part in arrays((6, 6), n_images=16)]

    def summed(x, kernel, dy):
        y, dx, dk = with_gradients(x, kernel, dy, SAME)
        return y, dx, jax.lax.psum(dk, "data")

    rows, whole = P("data"), P()
    mesh = make_mesh(data=2)
    specs = {"in_specs": (rows, whole, rows), "out_specs": (rows, rows, whole)}
    mapped = jax.shard_map(summed, mesh=mesh, check_vma=False, **specs)
    assert "length=4" in str(jax.make_jaxpr(mapped)(*numbers))
    expected = by_definition(*(np.asarray(part, np.float64) for part in numbers), SAME)
    for ours, theirs in zip(jax.jit(mapped)(*numbers), expected, strict=True):
        assert np.abs(ours - theirs).max() < 2e-6 * np.abs(theirs).max()


@pytest.mark.usefixtures("small_groups")
def test_a_batch_that_lies_on_devices_stays_there():
    mesh = make_mesh(data=2)
    x, kernel, dy = (jnp.asarray(part, jnp.float32) for part in arrays((6, 6)))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    compiled = jax.jit(with_gradients, static_argnums=3, in_shardings=(rows, whole, rows)).lower(x, kernel, dy, SAME)
    text = compiled.compile().as_text()
    assert "while(" in text
    assert "all-reduce(" in text  # of the gradient of the kernel
    for moved in ("all-gather(", "all-to-all(", "collective-permute("):
        assert moved not in text
