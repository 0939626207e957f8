"""Stacks of recurrent layers: plain, LSTM and GRU, in one or both directions, over sequences of unequal length.

Dimensions: `B` batch, `T` time, `D` inputs, `F` width of a state, `G` = gates x `F`, `L` layers x directions.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdl.models.checks import check, count_problem, name_problem, rate_problem
from jaxdl.models.layers import Dtype
from jaxdl.models.recurrent_cells import CELLS, Cell, States
from jaxdl.models.recurrent_gpu import IMPLEMENTATIONS, choose_implementation, cudnn_lstm
from jaxdl.models.recurrent_layer import Layer


class Recurrent(nn.Module):
    """Layers of a recurrent cell over time, in the equations and with the parameters of PyTorch and cuDNN.

    - "rnn" (Elman 1990): `h' = tanh(x W + b + h U + c)`; "rnn_relu" has max(., 0) instead.
    - "lstm" (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000): gates in the order input,
      forget, cell, output. The forget gate's bias starts at 1 (Jozefowicz et al. 2015).
    - "gru" (Cho et al. 2014, with the reset gate after the product): gates in the order reset, update, new.

    Padding never changes a number: where the mask is False the states stay, the output is exactly 0, and the backward
    direction starts at the last real token of each row. States are computed in float32 at least.

    Paths: `layer_<i>/forward/{input,recurrent}/{kernel,bias}`, and `layer_<i>/backward/...` if bidirectional. The
    kernels of all gates lie side by side: (D, G) and (F, G).

    Args:
      width: of a state; a bidirectional layer has 2 * width outputs.
      cell: rnn, rnn_relu, lstm, gru, or a `Cell`.
      n_layers: each layer reads the outputs of the one before.
      bidirectional: a second scan from the end, whose outputs are appended.
      dropout_rate: of the outputs of every layer but the last, in [0, 1).
      variational: the same values are dropped at all time steps of a row (Gal & Ghahramani 2016).
      implementation: "scan", "cudnn" (NVIDIA, float32, LSTM), or "auto": the one that `choose_implementation` finds.
      dtype: of the products and of the outputs.
      param_dtype: of the parameters.

    Raises:
      ModelError: fields that make no network (at construction), or inputs that do not fit it.

    Example:
      >>> model = Recurrent(width=4, cell="gru", n_layers=2)
      >>> x = jnp.ones((2, 5, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, carry = model.apply(variables, x, lengths=np.array([5, 2]))
      >>> y.shape, bool((y[1, 2:] == 0).all()), carry[0].shape
      ((2, 5, 4), True, (2, 2, 4))
      >>> first, carry = model.apply(variables, x[:, :2])
      >>> second, carry = model.apply(variables, x[:, 2:], carry=carry)
      >>> bool((second[0] == y[0, 2:]).all())
      True
    """

    width: int
    cell: str | Cell = "lstm"
    n_layers: int = 1
    bidirectional: bool = False
    dropout_rate: float = 0.0
    variational: bool = False
    implementation: Literal["auto", "scan", "cudnn"] = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        lonely = self.dropout_rate and self.n_layers == 1
        check(
            "Recurrent",
            count_problem("width", self.width),
            None if isinstance(self.cell, Cell) else name_problem("cell", str(self.cell), CELLS),
            count_problem("n_layers", self.n_layers),
            rate_problem("dropout_rate", self.dropout_rate),
            name_problem("implementation", str(self.implementation), IMPLEMENTATIONS),
            "dropout_rate acts between layers and n_layers=1 has no between; set it to 0, or add layers."
            if lonely
            else None,
        )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        *,
        mask: Array | None = None,
        lengths: Array | None = None,
        carry: States | None = None,
        train: bool = False,
    ) -> tuple[Array, States]:
        """Reads a batch of sequences.

        Args:
          x_BTD: (B, T, D) float.
          mask: (B, T) bool or int, 1 where a token is real; padding may lie anywhere.
          lengths: (B,) int, 1..T: the real tokens come first. Values are checked if it is a NumPy array; under `jit`
            they cannot be.
          carry: the states to start from, such as an earlier call returned for the piece of the sequences before this
            one; zeros where None. Not for a bidirectional stack, whose backward direction starts in the future.
          train: applies dropout.

        Returns:
          `(outputs_BTF, carry)`: (B, T, width or 2 * width) of `dtype`, and the states at each row's last real token,
          1 or 2 (`lstm`: h and c) arrays (L, B, F), layer by layer and forward before backward.

        Raises:
          ModelError: all that does not fit, at once.
        """
        self._check_call(x_BTD, mask, lengths, carry)
        wanted = "scan" if self.is_initializing() else self.implementation
        chosen = choose_implementation(wanted, cell=self.cell, dtype=self.dtype, has_mask=mask is not None)
        if lengths is not None:
            mask = jnp.arange(x_BTD.shape[1])[None] < jnp.asarray(lengths)[:, None]
        if mask is not None:
            mask = jnp.asarray(mask, bool)
            x_BTD = jnp.where(mask[..., None], x_BTD, 0)
        zeros = self.zero_carry(x_BTD.shape[0])
        carry = zeros if carry is None else tuple(s.astype(z.dtype) for s, z in zip(carry, zeros, strict=True))
        if chosen.name == "cudnn":
            return self._cudnn(x_BTD, lengths, carry, train)
        return self._scan(x_BTD, mask, carry, train)

    def zero_carry(self, n_rows: int) -> States:
        """The states that a sequence starts from: zeros (L, n_rows, width) of float32, or float64.

        Example:
          >>> [h.shape for h in Recurrent(width=4, n_layers=3).zero_carry(2)]
          [(3, 2, 4), (3, 2, 4)]
        """
        zeros = jnp.zeros((self._n_scans, n_rows, self.width), jnp.promote_types(self.dtype, jnp.float32))
        return (zeros,) * _cell(self.cell).n_states

    @property
    def _n_scans(self) -> int:
        return self.n_layers * (2 if self.bidirectional else 1)

    def _scan(self, x_BTD: Array, mask: Array | None, carry: States, train: bool) -> tuple[Array, States]:
        x_TBD, mask_TB = jnp.swapaxes(x_BTD, 0, 1).astype(self.dtype), None if mask is None else mask.T
        finals: list[States] = []
        for i in range(self.n_layers):
            n = len(finals)
            layer = Layer(
                _cell(self.cell), self.width, self.bidirectional, self.dtype, self.param_dtype, name=f"layer_{i}"
            )
            x_TBD, states = layer(x_TBD, mask_TB, [tuple(s[n + k] for s in carry) for k in range(layer.n_scans)])
            finals += states
            if i + 1 < self.n_layers:
                x_TBD = self._dropout(x_TBD, i, 0, train)
        return jnp.swapaxes(x_TBD, 0, 1), tuple(jnp.stack(s) for s in zip(*finals, strict=True))

    def _cudnn(self, x_BTD: Array, lengths: Array | None, carry: States, train: bool) -> tuple[Array, States]:
        params = self.variables["params"]
        if not (train and self.dropout_rate):
            return cudnn_lstm(params, x_BTD, lengths, carry)
        n, finals = self._n_scans // self.n_layers, []
        for i in range(self.n_layers):
            part = tuple(state[i * n : (i + 1) * n] for state in carry)
            x_BTD, states = cudnn_lstm({"layer_0": params[f"layer_{i}"]}, x_BTD, lengths, part)
            finals.append(states)
            if i + 1 < self.n_layers:
                x_BTD = self._dropout(x_BTD, i, 1, train)
        return x_BTD, tuple(jnp.concatenate(s) for s in zip(*finals, strict=True))

    def _dropout(self, x: Array, i: int, time_axis: int, train: bool) -> Array:
        shared = (time_axis,) if self.variational else ()
        return nn.Dropout(self.dropout_rate, broadcast_dims=shared, name=f"dropout_{i}")(x, deterministic=not train)

    def _check_call(self, x: Any, mask: Any, lengths: Any, carry: Any) -> None:
        is_batch = x.ndim == 3 and 0 not in x.shape
        if not is_batch:
            check("Recurrent", f"the input has shape {x.shape}; it must be (batch, time, features), none of them 0.")
        n_rows, n_steps = x.shape[:2]
        both = mask is not None and lengths is not None
        check(
            "Recurrent",
            _float_problem(x),
            "both mask and lengths are given; give one of them." if both else None,
            _shape_problem("mask", mask, (n_rows, n_steps)),
            _shape_problem("lengths", lengths, (n_rows,)),
            _lengths_problem(lengths, n_steps),
            _carry_problem(carry, jax.eval_shape(lambda: self.zero_carry(n_rows))),
            "a bidirectional stack takes no carry: its backward direction starts at the end of the sequence, which an "
            "earlier piece has not seen; drop the carry, or use bidirectional=False."
            if carry is not None and self.bidirectional
            else None,
        )


def _cell(cell: str | Cell) -> Cell:
    return cell if isinstance(cell, Cell) else CELLS[cell]


def _float_problem(x: Any) -> str | None:
    remedy = "embed tokens first (nn.Embed), or scale numbers to floats."
    return None if jnp.issubdtype(x.dtype, jnp.floating) else f"the inputs are {x.dtype}; {remedy}"


def _shape_problem(name: str, value: Any, shape: tuple[int, ...]) -> str | None:
    if value is None or np.shape(value) == shape:
        return None
    return f"{name} has shape {np.shape(value)}; for this input it must be {shape}."


def _lengths_problem(lengths: Any, n_steps: int) -> str | None:
    if not isinstance(lengths, np.ndarray | list | tuple):
        return None
    wrong = np.flatnonzero((np.asarray(lengths) < 1) | (np.asarray(lengths) > n_steps))
    if not len(wrong):
        return None
    found = np.asarray(lengths)[wrong[:4]].tolist()
    return f"lengths {found} of rows {wrong[:4].tolist()} are not in 1..{n_steps}; drop empty rows, cut long ones."


def _carry_problem(carry: Any, expected: States) -> str | None:
    wanted = [state.shape for state in expected]
    found = [np.shape(state) for state in carry] if isinstance(carry, tuple | list) else None
    if carry is None or found == wanted:
        return None
    got = type(carry).__name__ if found is None else f"shapes {found}"
    return f"carry is {got}; it must be a tuple of arrays of shapes {wanted} (layers, batch, width), as returned."
