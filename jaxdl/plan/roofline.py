"""How fast a step could be at the most: a bound from what the maker of a device says, and no prediction."""

from collections.abc import Mapping
from typing import Any

from jaxdl.plan.topology import Topology


def bound(
    topology: Topology, counted: Mapping[str, Any], least_bytes: int, *, n_devices: int | None = None
) -> dict[str, Any] | None:
    """The shortest time of a step, and the MFU that it would be.

    Args:
      topology: the devices.
      n_devices: how many of them the mesh takes; all where None.
      counted: of `step.count`: operations of all devices.
      least_bytes: what a device must read and write at the least.

    Returns:
      Seconds by resource, `step_s` (the largest), `mfu` (the model's operations over the devices' peak in that time,
      as PaLM counts them) and the assumptions; None where the rates are unknown.

    Example:
      >>> from jaxdl.plan.topology import parse_topology
      >>> told = bound(parse_topology("h100:1"), {"model": 989e12, "program": {"bfloat16": 2 * 989e12}}, 0)
      >>> told["step_s"], told["mfu"]
      (2.0, 0.5)
    """
    chip, n = topology.chip, n_devices or topology.n_devices
    if not chip.flops:
        return None
    slowest = min(chip.flops.values())
    compute = sum(count / chip.flops.get(dtype, slowest) for dtype, count in counted["program"].items()) / n
    memory = least_bytes / chip.bandwidth
    step = max(compute, memory)
    peak = max(chip.flops.values()) * n
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {dtype}" for dtype, rate in chip.flops.items())
    return {
        "compute_s": compute,
        "memory_s": memory,
        "step_s": step,
        "mfu": counted["model"] / (peak * step) if step else 0.0,
        "assumptions": [
            f"each device does {rates} and moves {chip.bandwidth / 1e9:.0f} GB/s, as its maker says",
            "products and convolutions alone take time, spread evenly over all devices",
            "state and batch are read once and the state is written once, all else stays on the chip",
            "devices never wait for each other, for the host or for data",
        ],
    }
