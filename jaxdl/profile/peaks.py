"""What a device could do at the most, and what keeps an operation from it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdl.plan.topology import CHIPS

SHORT_S = 20e-6
"""A call that is shorter costs as much to start as to do."""
HALF = 0.5
_CALLED = {"H100": "h100", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p"}
_CALLED |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e"}


@dataclass(frozen=True)
class Peaks:
    """Rates of one device.

    Attributes:
      flops: operations a second by the dtype of a product's operands.
      bandwidth: bytes a second between device and memory.
      source: where the figures are from.

    Example:
      >>> Peaks({"float32": 1e12, "bfloat16": 4e12}, 1e11, "made up").rate("int8") / 1e12
      1.0
    """

    flops: Mapping[str, float]
    bandwidth: float
    source: str

    def rate(self, dtype: str) -> float:
        """Operations a second; the slowest where the dtype is not known."""
        return self.flops.get(dtype, min(self.flops.values()))

    def seconds(self, flops: Mapping[str, float]) -> float:
        """The least time of so many operations by dtype."""
        return sum(count / self.rate(dtype) for dtype, count in flops.items())


def peaks_of(device: Any, n_devices: int = 1) -> Peaks:
    """What its maker says of a known card, else what is measured now: about a second.

    Args:
      device: of `jax.devices()`.
      n_devices: that work at the same time; those of a CPU share its cores.
    """
    for called, name in _CALLED.items():
        if called in device.device_kind:
            chip = CHIPS[name]
            return Peaks(chip.flops, chip.bandwidth, f"{chip.title}, as its maker says")
    shared = n_devices if device.platform == "cpu" else 1
    flops, bandwidth = measure_flops(device) / shared, measure_bandwidth(device) / shared
    among = f", shared by {shared} devices" if shared > 1 else ""
    return Peaks({"float32": flops}, bandwidth, f"measured here: product of 1536 x 1536, copy of 64 MiB{among}")


def measure_flops(device: Any, size: int = 1536) -> float:
    """Operations a second of a float32 product of two square matrices."""
    x = jax.device_put(jnp.full((size, size), 1e-3), device)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / _seconds(lambda: product(x, x))


def measure_bandwidth(device: Any, mib: int = 64) -> float:
    """Bytes a second that are read and written by an operation in place on a large array."""
    held = [jax.device_put(jnp.ones((mib * 2**18,), jnp.float32), device)]
    scale = jax.jit(lambda x: x * 0.5, donate_argnums=0)

    def call() -> jax.Array:
        held[0] = scale(held[0])
        return held[0]

    return 2 * mib * 2**20 / _seconds(call)


def _seconds(call: Callable[[], jax.Array], n: int = 7) -> float:
    """The fastest of n calls, after two: a peak is what was reached."""
    taken = []
    for _ in range(n + 2):
        start = time.perf_counter()
        call().block_until_ready()
        taken.append(time.perf_counter() - start)
    return min(taken[2:])


def limited_by(seconds: float, flops: float | None, n_bytes: float, dtype: str, peaks: Peaks) -> str:
    """What keeps an operation from being faster, from the time of one call and what it does in it.

    Args:
      seconds: of a call.
      flops: of a call; None where they are not known.
      n_bytes: of a call, if all comes from memory and goes there.
      dtype: of the operands of its products.
      peaks: of the device.

    Returns:
      `compute`: at half of the peak FLOP/s or more; `memory`: likewise of the bytes; `launch`: shorter than 20 us;
      else `neither` with both shares.

    Example:
      >>> peaks = Peaks({"float32": 1e12}, 1e11, "made up")
      >>> [limited_by(1e-3, flops, n_bytes, "float32", peaks) for flops, n_bytes in ((6e8, 0), (1e8, 7e7), (2e8, 1e7))]
      ['compute', 'memory', 'neither: 20 % of FLOP/s, 10 % of bytes/s']
      >>> limited_by(5e-6, 1e6, 1e3, "float32", peaks)
      'launch'
    """
    if seconds <= 0:
        return "launch"
    compute = 0.0 if flops is None else flops / seconds / peaks.rate(dtype)
    memory = n_bytes / seconds / peaks.bandwidth
    if max(compute, memory) >= HALF:
        return "compute" if compute >= memory else "memory"
    if seconds < SHORT_S:
        return "launch"
    known = "FLOP/s unknown, " if flops is None else f"{100 * compute:.0f} % of FLOP/s, " if flops else ""
    return f"neither: {known}{100 * memory:.0f} % of bytes/s"
