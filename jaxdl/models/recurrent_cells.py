"""Recurrent cells with their derivatives written out, and the scan over time that uses them.

Dimensions: `B` batch, `T` time, `F` width of a state, `G` = gates x `F`.

Automatic differentiation of a scan adds up the gradient of the recurrent kernel at every step: `T` small products and
`T` sums of the whole matrix. Here the backward scan only carries the gradient of the states, and the kernel's gradient
is one product over all steps afterwards. The derivatives are those of reverse mode, as often as wanted; forward mode
(`jax.jvp`, `jax.jacfwd`) of a recurrent network is refused by JAX.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

States = tuple[Array, ...]


class Cell(NamedTuple):
    """One step of a recurrence, split into what depends on the input, `x_BG`, and on the last state, `h_BG`.

    `x_BG = x @ input_kernel + input_bias` and `h_BG = h @ recurrent_kernel + recurrent_bias` come from outside.

    Attributes:
      gate_biases: what the input bias of each gate starts at; both kernels have `len(gate_biases) * F` columns.
      n_states: arrays (B, F) that a step hands on; the first is the output `h`.
      forward: `(x_BG, h_BG, old) -> (new, saved)`, with whatever `backward` needs in `saved`.
      backward: `(saved, old, new, d_new) -> (d_x_BG, d_h_BG, d_old)`, where `d_old` leaves out what flows through
        `h_BG`.
      is_sum: the cell sees `x_BG + h_BG` only, so that `d_x_BG` and `d_h_BG` are one array.
    """

    gate_biases: tuple[float, ...]
    n_states: int
    forward: Callable[[Array, Array, States], tuple[States, Any]]
    backward: Callable[[Any, States, States, States], tuple[Array, Array, States]]
    is_sum: bool = False


def _tanh_forward(x: Array, h: Array, old: States) -> tuple[States, Any]:
    return (jnp.tanh(x + h),), ()


def _tanh_backward(saved: Any, old: States, new: States, d_new: States) -> tuple[Array, Array, States]:
    d = d_new[0] * (1.0 - new[0] ** 2)
    return d, d, (jnp.zeros_like(d),)


def _relu_forward(x: Array, h: Array, old: States) -> tuple[States, Any]:
    return (jnp.maximum(x + h, 0.0),), ()


def _relu_backward(saved: Any, old: States, new: States, d_new: States) -> tuple[Array, Array, States]:
    d = jnp.where(new[0] > 0, d_new[0], 0.0)
    return d, d, (jnp.zeros_like(d),)


def _lstm_forward(x: Array, h: Array, old: States) -> tuple[States, Any]:
    i, f, g, o = jnp.split(x + h, 4, -1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c = f * old[1] + i * g
    return (o * jnp.tanh(c), c), jnp.concatenate([i, f, g, o], -1)


def _lstm_backward(saved: Any, old: States, new: States, d_new: States) -> tuple[Array, Array, States]:
    (i, f, g, o), tanh_c, (d_h, d_c) = jnp.split(saved, 4, -1), jnp.tanh(new[1]), d_new
    d_c = d_c + d_h * o * (1.0 - tanh_c**2)
    d_i, d_f, d_g = d_c * g * i * (1.0 - i), d_c * old[1] * f * (1.0 - f), d_c * i * (1.0 - g**2)
    d = jnp.concatenate([d_i, d_f, d_g, d_h * tanh_c * o * (1.0 - o)], -1)
    return d, d, (jnp.zeros_like(d_h), d_c * f)


def _gru_forward(x: Array, h: Array, old: States) -> tuple[States, Any]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(x, 3, -1), jnp.split(h, 3, -1)
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    return ((1.0 - z) * n + z * old[0],), jnp.concatenate([r, z, n, h_n], -1)


def _gru_backward(saved: Any, old: States, new: States, d_new: States) -> tuple[Array, Array, States]:
    (r, z, n, h_n), (d,) = jnp.split(saved, 4, -1), d_new
    d_n = d * (1.0 - z) * (1.0 - n**2)
    d_z, d_r = d * (old[0] - n) * z * (1.0 - z), d_n * h_n * r * (1.0 - r)
    return jnp.concatenate([d_r, d_z, d_n], -1), jnp.concatenate([d_r, d_z, d_n * r], -1), (d * z,)


CELLS: dict[str, Cell] = {
    "rnn": Cell((0.0,), 1, _tanh_forward, _tanh_backward, is_sum=True),
    "rnn_relu": Cell((0.0,), 1, _relu_forward, _relu_backward, is_sum=True),
    "lstm": Cell((0.0, 1.0, 0.0, 0.0), 2, _lstm_forward, _lstm_backward, is_sum=True),
    "gru": Cell((0.0, 0.0, 0.0), 1, _gru_forward, _gru_backward),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_cell(
    cell: Cell,
    reverse: bool,
    x_TBG: Array,
    kernel_FG: Array,
    bias_G: Array | None,
    initial: States,
    mask_TB: Array | None,
) -> tuple[Array, States]:
    """Runs a cell over time; where the mask is False the states stay as they are.

    Args:
      cell: one of `CELLS`, or a `Cell` of your own.
      reverse: from the last step to the first.
      x_TBG: the inputs of all steps, already multiplied by the input kernel.
      kernel_FG: the recurrent kernel; its dtype is that of the products, all else has the states'.
      bias_G: the recurrent bias; None where it is in `x_TBG` already, which a cell with `is_sum` allows.
      initial: `cell.n_states` arrays (B, F), float32 or float64.
      mask_TB: bool, or None if every step counts.

    Returns:
      `(h_TBF, final)`: the first state after each step, and all states after the last.

    Example:
      >>> x, kernel, h = jnp.ones((3, 1, 2)), jnp.zeros((2, 2)), jnp.zeros((1, 2))
      >>> outputs, (final,) = scan_cell(CELLS["rnn_relu"], False, x, kernel, jnp.zeros(2), (h,), None)
      >>> outputs.shape, final.tolist()
      ((3, 1, 2), [[1.0, 1.0]])
    """
    return _scan_forward(cell, reverse, x_TBG, kernel_FG, bias_G, initial, mask_TB)[0]


def _scan_forward(
    cell: Cell,
    reverse: bool,
    x_TBG: Array,
    kernel_FG: Array,
    bias_G: Array | None,
    initial: States,
    mask_TB: Array | None,
) -> tuple[tuple[Array, States], Any]:
    def step(old: States, t: Any) -> tuple[States, Any]:
        x_BG, mask_B = t
        h_BG = _product(old[0], kernel_FG)
        h_BG = h_BG if bias_G is None else h_BG + bias_G.astype(h_BG.dtype).reshape(1, -1)
        new, saved = cell.forward(x_BG.astype(h_BG.dtype), h_BG, old)
        new = _choose(mask_B, new, old)
        return new, (new, saved)

    final, (states, saved) = jax.lax.scan(step, initial, (x_TBG, mask_TB), reverse=reverse)
    return (states[0], final), (x_TBG, kernel_FG, bias_G, initial, mask_TB, states, saved)


def _scan_backward(cell: Cell, reverse: bool, residuals: Any, cotangents: tuple[Array, States]) -> tuple[Any, ...]:
    x_TBG, kernel_FG, bias_G, initial, mask_TB, states, saved = residuals
    d_h_TBF, d_final = cotangents
    before = tuple(_shifted(first, later, reverse) for first, later in zip(initial, states, strict=True))
    kernel_GF = kernel_FG.T

    def step(d_new: States, t: Any) -> tuple[States, Any]:
        saved, old, new, d_h_BF, mask_B = t
        d_new = (d_new[0] + d_h_BF, *d_new[1:])
        zeros = jax.tree.map(jnp.zeros_like, d_new)
        d_x_BG, d_h_BG, d_old = cell.backward(saved, old, new, _choose(mask_B, d_new, zeros))
        d_old = (d_old[0] + _product(d_h_BG, kernel_GF), *d_old[1:])
        return _choose(mask_B, d_old, d_new), (d_x_BG, None if cell.is_sum else d_h_BG)

    times = (saved, before, states, d_h_TBF, mask_TB)
    d_initial, (d_x_TBG, d_h_TBG) = jax.lax.scan(step, d_final, times, reverse=not reverse)
    d_h_TBG = d_x_TBG if cell.is_sum else d_h_TBG
    h_TBF, d_TBG = before[0].astype(kernel_FG.dtype), d_h_TBG.astype(kernel_FG.dtype)
    d_kernel_FG = jnp.tensordot(h_TBF, d_TBG, ((0, 1), (0, 1)), preferred_element_type=d_h_TBG.dtype)
    d_bias_G = None if bias_G is None else d_h_TBG.sum((0, 1)).astype(bias_G.dtype)
    return d_x_TBG.astype(x_TBG.dtype), d_kernel_FG.astype(kernel_FG.dtype), d_bias_G, d_initial, None


scan_cell.defvjp(_scan_forward, _scan_backward)


def _product(a: Array, kernel: Array) -> Array:
    """In the kernel's dtype, summed in the states'."""
    return jnp.matmul(a.astype(kernel.dtype), kernel, preferred_element_type=a.dtype)


def _choose(mask_B: Array | None, new: States, old: States) -> States:
    if mask_B is None:
        return new
    return tuple(jnp.where(mask_B[:, None], a, b) for a, b in zip(new, old, strict=True))


def _shifted(initial: Array, states: Array, reverse: bool) -> Array:
    """The state before each step."""
    parts = [states[1:], initial[None]] if reverse else [initial[None], states[:-1]]
    return jnp.concatenate(parts)
