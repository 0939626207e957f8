"""Max-pooling: value against XLA's reduce_window, gradient against PyTorch, ties and padding included."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdl.models import ModelError, max_pool

# (height and width, window, strides, padding)
CASES = [
    ((6, 8), 2, None, 0),
    ((7, 9), 2, None, 0),
    ((9, 7), (3, 2), None, 0),
    ((8, 8), 3, 2, 1),
    ((9, 7), 3, 2, 1),
    ((7, 7), 3, 1, 1),
    ((7, 8), 2, 3, 0),
    ((6, 6), 2, 2, 1),
    ((5, 5), 5, 1, 2),
]


def images(kind: str, size: tuple[int, int], dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (2, *size, 3)
    values = {
        "normal": rng.normal(size=shape),
        "ties": rng.integers(0, 2, size=shape).astype(float),
        "equal": np.zeros(shape),
        "negative": -1.0 - rng.random(shape),
    }
    return values[kind].astype(dtype)


def brute_force(x, grad, window, strides, pads):
    """The definition, window by window, in NumPy: value, and gradient to the first maximum."""
    x_padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)), constant_values=-np.inf)
    value, total = np.zeros(grad.shape), np.zeros(x_padded.shape)
    for b, i, j, c in itertools.product(*map(range, grad.shape)):
        top, left = i * strides[0], j * strides[1]
        tile = x_padded[b, top : top + window[0], left : left + window[1], c]
        row, column = np.unravel_index(np.argmax(tile), tile.shape)
        value[b, i, j, c] = tile[row, column]
        total[b, top + row, left + column, c] += grad[b, i, j, c]
    (low_i, _), (low_j, _) = pads
    return value, total[:, low_i : low_i + x.shape[1], low_j : low_j + x.shape[2]]


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "negative"])
@pytest.mark.parametrize(("size", "window", "strides", "padding"), CASES)
def test_value_and_gradient_are_pytorchs(kind, size, window, strides, padding):
    torch = pytest.importorskip("torch")
    x = images(kind, size)
    x_torch = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    y_torch = torch.nn.functional.max_pool2d(x_torch, window, strides, padding)
    grad = np.random.default_rng(1).integers(1, 9, size=y_torch.shape).astype(np.float32)  # sums of integers are exact
    y_torch.backward(torch.tensor(grad))
    y, pull = jax.vjp(jax.jit(lambda x: max_pool(x, window, strides, padding)), jnp.asarray(x))
    np.testing.assert_array_equal(y, y_torch.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(
        pull(jnp.asarray(grad.transpose(0, 2, 3, 1)))[0], x_torch.grad.numpy().transpose(0, 2, 3, 1)
    )


@pytest.mark.parametrize("kind", ["ties", "negative"])
@pytest.mark.parametrize(
    ("window", "strides", "pads"),
    [((2, 2), (2, 2), ((0, 0), (0, 0))), ((3, 2), (2, 1), ((0, 2), (1, 0))), ((2, 2), (2, 2), ((0, 1), (0, 1)))],
)
def test_value_and_gradient_are_the_definition(kind, window, strides, pads):
    x = images(kind, (7, 5))
    y, pull = jax.vjp(lambda x: max_pool(x, window, strides, pads), jnp.asarray(x))
    grad = np.random.default_rng(2).integers(1, 9, size=y.shape).astype(np.float32)
    value, x_grad = brute_force(x, grad, window, strides, pads)
    np.testing.assert_array_equal(y, value)
    np.testing.assert_array_equal(pull(jnp.asarray(grad))[0], x_grad)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize(("window", "strides"), [(2, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_named_padding_has_reduce_windows_value(padding, window, strides, size):
    x = jnp.asarray(images("normal", size))
    want = lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, strides, strides, 1), padding)
    np.testing.assert_array_equal(max_pool(x, window, strides, padding), want)


def test_all_equal_sends_the_gradient_to_the_first_place_only():
    grad = jax.grad(lambda x: max_pool(x, 2).sum())(jnp.ones((1, 4, 4, 1)))
    want = np.zeros((4, 4))
    want[::2, ::2] = 1
    np.testing.assert_array_equal(grad[0, :, :, 0], want)


def test_dropped_row_and_column_get_no_gradient():
    grad = jax.grad(lambda x: max_pool(x, 2).sum())(jnp.ones((1, 5, 5, 1)))
    assert grad.sum() == 4
    assert grad[0, 4].sum() == grad[0, :, 4].sum() == 0


def test_nan_wins():
    x = jnp.array([[1.0, jnp.nan], [3.0, 2.0]]).reshape(1, 2, 2, 1)
    assert jnp.isnan(max_pool(x, 2)).all()
    y, pull = jax.vjp(lambda x: max_pool(x, 2), x)
    assert jnp.isnan(y).all()
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0].ravel(), [0, 1, 0, 0])


def test_one_and_three_spatial_axes():
    line = jnp.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0]).reshape(1, 6, 1)
    np.testing.assert_array_equal(max_pool(line, 2).ravel(), [3, 4, 9])
    np.testing.assert_array_equal(jax.grad(lambda x: max_pool(x, 3, 1).sum())(line).ravel(), [0, 0, 2, 0, 1, 1])
    cube = jnp.arange(64.0).reshape(1, 4, 4, 4, 1)
    grad = jax.grad(lambda x: max_pool(x, 2).sum())(cube)
    np.testing.assert_array_equal(np.flatnonzero(grad), [21, 23, 29, 31, 53, 55, 61, 63])


def test_integers_pool_and_low_precision_keeps_its_dtype():
    assert max_pool(jnp.array([-5, -7, -6, -9]).reshape(1, 4, 1), 3, 1, 1).ravel().tolist() == [-5, -5, -6, -6]
    x = jnp.asarray(images("ties", (4, 4))).astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda x: max_pool(x, 3, 2, 1), x)
    assert (y.dtype, pull(y)[0].dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_vmap_and_second_derivative():
    x = jnp.asarray(images("normal", (4, 4)))
    np.testing.assert_array_equal(jax.vmap(lambda x: max_pool(x[None], 2)[0])(x), max_pool(x, 2))

    def loss(x):
        return (max_pool(x, 2) ** 3).sum()

    curvature = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), jnp.ones_like(x)))(x)
    is_top = jax.grad(lambda x: max_pool(x, 2).sum())(x)
    np.testing.assert_allclose(curvature, 6 * x * is_top, rtol=1e-6)


@pytest.mark.parametrize(
    ("window", "strides", "padding"), [(5, 2, 0), (2, 0, 0), (2, 2, 2), ((2, 2, 2), None, 0), (2, 1, [(-1, 0), (0, 0)])]
)
def test_impossible_windows_are_refused(window, strides, padding):
    with pytest.raises(ModelError, match=r"max_pool: [12] problem"):
        max_pool(jnp.zeros((1, 4, 4, 1)), window, strides, padding)


def test_what_comes_back_to_a_pool_is_made_once():
    """Fused into the gradient of the pool, the sines would be computed at every place of a window."""
    x, grad = jnp.ones((2, 8, 8, 4)), jnp.ones((2, 4, 4, 4))
    text = (
        jax.jit(lambda x, grad: jax.vjp(lambda x: max_pool(x, 2), x)[1](jnp.sin(grad)))
        .lower(x, grad)
        .compile()
        .as_text()
    )
    assert "_spread" in text
    assert [line for line in text.splitlines() if " sine(" in line and "f32[2,4,4,4]" in line]
    assert not [line for line in text.splitlines() if " sine(" in line and "f32[2,4,2,4,2,4]" in line]
