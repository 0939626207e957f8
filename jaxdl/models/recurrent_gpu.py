"""The LSTM of NVIDIA's cuDNN, with the parameters of `Recurrent`, and the choice between it and a scan.

Dimensions: `B` batch, `T` time, `D` inputs, `F` width of a state, `L` layers x directions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import rnn

from jaxdl.choices import tell
from jaxdl.models.checks import ModelError
from jaxdl.models.recurrent_cells import CELLS, Cell, States
from jaxdl.paths import Tree

IMPLEMENTATIONS = ("auto", "scan", "cudnn")
LstmFn = Callable[..., tuple[Array, Array, Array]]


class Choice(NamedTuple):
    """How a recurrent stack is computed, and why.

    Attributes:
      name: "scan" or "cudnn".
      reason: for the log.
    """

    name: str
    reason: str


def choose_implementation(
    wanted: str, *, cell: str | Cell, dtype: Any, has_mask: bool, platform: str | None = None, n_devices: int = 0
) -> Choice:
    """Decides between a scan and cuDNN's LSTM, and logs each new answer once.

    cuDNN takes an LSTM in float32 on NVIDIA devices whose padding is given by lengths. Where JAX sees several devices
    "auto" scans, since `jit` cannot split the call over a sharded batch; inside `shard_map`, ask for "cudnn".

    Args:
      wanted: "auto", "scan" or "cudnn".
      cell: as for `Recurrent`.
      dtype: of the computation.
      has_mask: padding is given by a mask.
      platform: such as "cuda 13000"; of JAX's default device where None.
      n_devices: that the batch may be spread over; all that JAX sees where 0.

    Raises:
      ModelError: "cudnn" where it cannot be.

    Example:
      >>> choose_implementation("auto", cell="lstm", dtype=jnp.float32, has_mask=False, platform="cuda", n_devices=1)
      Choice(name='cudnn', reason='an LSTM in float32 on one NVIDIA device')
      >>> choose_implementation("auto", cell="gru", dtype=jnp.float32, has_mask=False, platform="cuda").name
      'scan'
    """
    obstacles = [
        (cell not in ("lstm", CELLS["lstm"]), "cuDNN is bound for the LSTM only"),
        (jnp.dtype(dtype) != jnp.float32, f"cuDNN is bound for float32 only, not {jnp.dtype(dtype)}"),
        (has_mask, "padding is given by a mask, which may have holes; cuDNN takes lengths"),
        ("cuda" not in (platform or _platform()), "the default device is no NVIDIA GPU"),
    ]
    found = [reason for is_met, reason in obstacles if is_met]
    if wanted == "cudnn" and found:
        raise ModelError.listing("implementation='cudnn'", [f"{reason}; use 'auto' or 'scan'." for reason in found])
    if wanted == "auto" and (n_devices or jax.device_count()) > 1:
        found.append("jit cannot split cuDNN's call over several devices")
    if wanted == "scan":
        found = ["it was asked for"]
    choice = Choice("scan", found[0]) if found else Choice("cudnn", "an LSTM in float32 on one NVIDIA device")
    tell("recurrent layers", choice.name, choice.reason)
    return choice


def _platform() -> str:
    device = jax.config.values["jax_default_device"] or jax.devices()[0]
    return device if isinstance(device, str) else device.client.platform_version


def cudnn_lstm(
    params: Mapping[str, Tree], x_BTD: Array, lengths: Array | None, carry: States, *, lstm: LstmFn = rnn.lstm
) -> tuple[Array, States]:
    """A whole stack of LSTM layers in one call of cuDNN.

    Args:
      params: `layer_<i>/{forward,backward}/{input,recurrent}/{kernel,bias}`.
      x_BTD: (B, T, D) float32.
      lengths: (B,) int, or None for full rows.
      carry: h and c, (L, B, F) each.
      lstm: the function to call, with the signature of `jax.experimental.rnn.lstm`.

    Returns:
      `(outputs_BTF, (h, c))`, exactly 0 at padding.
    """
    n_rows, n_steps, n_inputs = x_BTD.shape
    lengths = jnp.full(n_rows, n_steps, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    y_BTF, h_LBF, c_LBF = lstm(
        x_BTD,
        *carry,
        pack_lstm(params),
        lengths,
        n_inputs,
        carry[0].shape[-1],
        len(params),
        0.0,
        len(params["layer_0"]) == 2,
    )
    is_real_BT = jnp.arange(n_steps)[None] < lengths[:, None]
    return jnp.where(is_real_BT[..., None], y_BTF, 0), (h_LBF, c_LBF)


def pack_lstm(params: Mapping[str, Tree]) -> Array:
    """Lays the parameters of a stack out as cuDNN's vector: all kernels, then all biases, layer by layer.

    Args:
      params: `layer_<i>/{forward,backward}/{input,recurrent}/{kernel,bias}`.

    Returns:
      A vector of as many values as the parameters hold.

    Example:
      >>> side = {"kernel": jnp.ones((2, 8)), "bias": jnp.zeros(8)}
      >>> pack_lstm({"layer_0": {"forward": {"input": side, "recurrent": side}}}).shape
      (48,)
    """
    directions = [
        params[f"layer_{i}"][name]
        for i in range(len(params))
        for name in ("forward", "backward")
        if name in params[f"layer_{i}"]
    ]
    sides = [direction[side] for direction in directions for side in ("input", "recurrent")]
    return jnp.concatenate([*(side["kernel"].T.reshape(-1) for side in sides), *(side["bias"] for side in sides)])
