"""Max-pooling with a gradient that is fast on a CPU and sends ties where PyTorch sends them."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxdl.models.checks import check
from jaxdl.models.uninlined import uninlined

Pads = tuple[tuple[int, int], ...]


def max_pool(
    x: Array,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
) -> Array:
    """The maximum over windows, with a gradient that goes to the first maximum, as PyTorch's does.

    XLA's own gradient of a max-pool is 8 to 25 times slower on a CPU. Reverse mode only (`jax.jvp` of it raises).

    Args:
      x: (B, *space, C), floats or integers; NaN wins, as in PyTorch.
      window: the window's size, one for all spatial axes or one each.
      strides: the step between windows; the window itself by default.
      padding: "VALID", "SAME", pixels on every side, or a (low, high) pair for each spatial axis; pads with -inf.

    Returns:
      (B, *pooled space, C) of `x`'s dtype.

    Raises:
      ModelError: a window that is larger than the padded input, or a padding that is not smaller than its window.

    Example:
      >>> x = jnp.array([1.0, 5.0, 5.0, 2.0]).reshape(1, 4, 1)
      >>> max_pool(x, 2).ravel().tolist(), jax.grad(lambda x: max_pool(x, 3, 1).sum())(x).ravel().tolist()
      ([5.0, 5.0], [0.0, 2.0, 0.0, 0.0])
    """
    n_axes = x.ndim - 2
    sizes = _each_axis(window, n_axes)
    steps = sizes if strides is None else _each_axis(strides, n_axes)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], sizes, steps, padding)
    elif isinstance(padding, int):
        padding = [(padding, padding)] * n_axes
    pads = tuple((int(low), int(high)) for low, high in padding)
    problems = [
        f"window={w}, strides={s}, padding={p} do not fit an axis of {n}; it takes strides >= 1, "
        "0 <= padding < window <= padded axis."
        for n, w, s, p in zip(x.shape[1:-1], sizes, steps, pads, strict=True)
        if not (s >= 1 and min(p) >= 0 and max(p) < w <= n + sum(p))
    ]
    check("max_pool", *problems)
    return _max_pool(x, sizes, steps, pads)


def _each_axis(value: int | Sequence[int], n_axes: int) -> tuple[int, ...]:
    values = (value,) * n_axes if isinstance(value, int) else tuple(value)
    wrong = None if len(values) == n_axes else f"{values} must hold one number for each of {n_axes} spatial axes."
    check("max_pool", wrong)
    return values


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, window: tuple[int, ...], strides: tuple[int, ...], pads: Pads) -> Array:
    return functools.reduce(jnp.maximum, _taps(x, window, strides, pads))


def _taps(x: Array, window: tuple[int, ...], strides: tuple[int, ...], pads: Pads) -> Iterator[Array]:
    """Yields, for each place in the window, what every window holds there."""
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    if any(map(any, pads)):
        x = lax.pad(x, jnp.array(lowest, x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])
    spans = [(n - w) // s * s + 1 for n, w, s in zip(x.shape[1:-1], window, strides, strict=True)]
    for place in itertools.product(*map(range, window)):
        ends = [at + span for at, span in zip(place, spans, strict=True)]
        yield lax.slice(x, (0, *place, 0), (x.shape[0], *ends, x.shape[-1]), (1, *strides, 1))


def _max_pool_fwd(
    x: Array, window: tuple[int, ...], strides: tuple[int, ...], pads: Pads
) -> tuple[Array, tuple[Array, tuple[int, ...]]]:
    index_dtype = jnp.uint8 if math.prod(window) <= 256 else jnp.int32
    taps = _taps(x, window, strides, pads)
    best = next(taps)
    winner = jnp.zeros(best.shape, index_dtype)
    for place, tap in enumerate(taps, start=1):
        is_better = (tap > best) | (tap != tap)
        best = jnp.where(is_better, tap, best)
        winner = jnp.where(is_better, jnp.array(place, index_dtype), winner)
    return best, (winner, x.shape)


def _max_pool_bwd(
    window: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Pads,
    saved: tuple[Array, tuple[int, ...]],
    grad: Array,
) -> tuple[Array]:
    winner, shape = saved
    if jax.default_backend() == "cpu":
        return (uninlined(_spread, winner, grad, window, strides, pads, shape),)
    return (_spread(winner, grad, window, strides, pads, shape),)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _spread(
    winner: Array,
    grad: Array,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Pads,
    shape: tuple[int, ...],
) -> Array:
    """The gradient of what a max-pool gave, at the places of `winner` in an array of `shape`."""
    n_axes = len(window)
    if window == strides and not any(map(any, pads)):
        split_axes = tuple(range(2, 2 * n_axes + 1, 2))
        places = jnp.arange(math.prod(window), dtype=winner.dtype).reshape(1, *_interleave(window), 1)
        spread = jnp.where(jnp.expand_dims(winner, split_axes) == places, jnp.expand_dims(grad, split_axes), 0)
        spread = spread.reshape(shape[0], *(n * w for n, w in zip(grad.shape[1:-1], window, strict=True)), shape[-1])
        rest = [(0, n - m, 0) for n, m in zip(shape, spread.shape, strict=True)]
        return lax.pad(spread, jnp.zeros((), grad.dtype), rest)
    total = jnp.zeros(shape, grad.dtype)
    for i, place in enumerate(itertools.product(*map(range, window))):
        layout = [(0, 0, 0)]
        for at, n, m, s, (low, _) in zip(place, shape[1:-1], grad.shape[1:-1], strides, pads, strict=True):
            layout.append((at - low, n - (at - low + (m - 1) * s + 1), s - 1))  # a negative pad crops
        total += lax.pad(jnp.where(winner == i, grad, 0), jnp.zeros((), grad.dtype), [*layout, (0, 0, 0)])
    return total


def _interleave(window: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for w in window for size in (1, w))


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)
