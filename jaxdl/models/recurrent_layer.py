"""One recurrent layer: the parameters of each direction, and a scan over them.

Dimensions: `B` batch, `T` time, `D` inputs, `F` width of a state, `G` = gates x `F`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.models.layers import Dtype
from jaxdl.models.product import product
from jaxdl.models.recurrent_cells import Cell, States, scan_cell


class Layer(nn.Module):
    """One layer in one or both directions, on time-major arrays; the building block of `Recurrent`.

    Example:
      >>> from jaxdl.models.recurrent_cells import CELLS
      >>> layer, h = Layer(CELLS["gru"], 4, True), jnp.zeros((2, 4))
      >>> (y, finals), _ = layer.init_with_output(jax.random.key(0), jnp.ones((5, 2, 3)), None, [(h,), (h,)])
      >>> y.shape, len(finals)
      ((5, 2, 8), 2)
    """

    cell: Cell
    width: int
    bidirectional: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def n_scans(self) -> int:
        return 2 if self.bidirectional else 1

    @nn.compact
    def __call__(self, x_TBD: Array, mask_TB: Array | None, initial: list[States]) -> tuple[Array, list[States]]:
        """(T, B, D), (T, B) and the states of each direction -> (T, B, F or 2F) and the states after the last step."""
        outputs, finals = [], []
        for k, name in enumerate(("forward", "backward")[: self.n_scans]):
            scan = Direction(self.cell, self.width, name == "backward", self.dtype, self.param_dtype, name=name)
            y_TBF, final = scan(x_TBD, mask_TB, initial[k])
            outputs.append(y_TBF)
            finals.append(final)
        y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, -1)
        return (y if mask_TB is None else jnp.where(mask_TB[..., None], y, 0)), finals


class Direction(nn.Module):
    """One scan, from the first step or from the last: `input` multiplies all steps at once, `recurrent` each in turn.

    Example:
      >>> from jaxdl.models.recurrent_cells import CELLS
      >>> scan, h = Direction(CELLS["rnn"], 4, False), jnp.zeros((2, 4))
      >>> _, variables = scan.init_with_output(jax.random.key(0), jnp.ones((5, 2, 3)), None, (h,))
      >>> jax.tree.map(jnp.shape, variables["params"]["input"])
      {'bias': (4,), 'kernel': (3, 4)}
    """

    cell: Cell
    width: int
    reverse: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_TBD: Array, mask_TB: Array | None, initial: States) -> tuple[Array, States]:
        """(T, B, D), (T, B) and the states to start from -> (T, B, F) of `dtype` and the states after the last step."""
        n_gates = len(self.cell.gate_biases)
        x_TBG = nn.Dense(
            n_gates * self.width,
            bias_init=_gate_biases(self.cell),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=product,
            name="input",
        )(x_TBD)
        kernel_FG, bias_G = Recurrence(self.width, n_gates, self.param_dtype, name="recurrent")()
        is_sum = self.cell.is_sum
        x_TBG = x_TBG + bias_G.astype(self.dtype).reshape(1, 1, -1) if is_sum else x_TBG
        bias = None if is_sum else bias_G
        h_TBF, final = scan_cell(self.cell, self.reverse, x_TBG, kernel_FG.astype(self.dtype), bias, initial, mask_TB)
        return h_TBF.astype(self.dtype), final


class Recurrence(nn.Module):
    """The parameters that multiply the last state: an orthogonal kernel for each gate (Saxe et al. 2014).

    Example:
      >>> (kernel, bias), _ = Recurrence(4, 3).init_with_output(jax.random.key(0))
      >>> kernel.shape, bias.shape, bool(jnp.allclose(kernel[:, :4] @ kernel[:, :4].T, jnp.eye(4), atol=1e-5))
      ((4, 12), (12,), True)
    """

    width: int
    n_gates: int
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        size = self.n_gates * self.width
        kernel = self.param("kernel", _orthogonal_gates, (self.width, size), self.param_dtype)
        return kernel, self.param("bias", nn.initializers.zeros, (size,), self.param_dtype)


def _orthogonal_gates(rng: Array, shape: tuple[int, int], dtype: Dtype) -> Array:
    width, size = shape
    orthogonal = nn.initializers.orthogonal()
    return jnp.concatenate([orthogonal(key, (width, width), dtype) for key in jax.random.split(rng, size // width)], -1)


def _gate_biases(cell: Cell) -> nn.initializers.Initializer:
    return lambda rng, shape, dtype: jnp.repeat(jnp.array(cell.gate_biases, dtype), shape[0] // len(cell.gate_biases))
