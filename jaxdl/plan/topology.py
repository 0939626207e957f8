"""Devices that are not here: their names, what they can do, and descriptions that XLA compiles for."""

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest

GIB = 2**30
H100_TARGET = Path(__file__).parent / "h100_sxm.txtpb"
GPUS_PER_HOST = 8


class TopologyError(JaxdlError):
    """A topology that is unknown, or that cannot be compiled for here."""


@dataclass(frozen=True)
class Chip:
    """What one device can do, as its maker says.

    Attributes:
      platform: as JAX calls it: cpu, gpu or tpu.
      title: for a person.
      memory: bytes that a program may use; 0 where that is the machine's.
      bandwidth: bytes a second between the device and its memory; 0 where unknown.
      flops: dense operations a second by the dtype of a product's operands, at JAX's default precision.
      n_dimensions: of a grid of such devices; 1 where they are only counted.
      cores_in_name: whether the cloud's names count two cores a chip.
      libtpu: what libtpu calls it.
    """

    platform: str
    title: str
    memory: int = 0
    bandwidth: float = 0.0
    flops: Mapping[str, float] = field(default_factory=dict)
    n_dimensions: int = 1
    cores_in_name: bool = False
    libtpu: str = ""


def _tpu(name: str, title: str, gib: float, gigabytes: float, teraflops: float, n_dimensions: int) -> Chip:
    """On a TPU a float32 product at default precision is one pass in bfloat16."""
    rates = dict.fromkeys(("bfloat16", "float16", "float32"), teraflops * 1e12)
    is_cube = n_dimensions == 3
    return Chip("tpu", title, int(gib * GIB), gigabytes * 1e9, rates, n_dimensions, is_cube, name)


CHIPS: Mapping[str, Chip] = {
    "cpu": Chip("cpu", "this machine's CPU"),
    "h100": Chip(
        "gpu",
        "NVIDIA H100 SXM 80 GB",
        84929347584,
        3.35e12,
        {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12},
    ),
    "v4": _tpu("v4", "TPU v4", 30.75, 1228, 275, 3),
    "v5e": _tpu("v5e", "TPU v5e", 15.75, 819, 197, 2),
    "v5p": _tpu("v5p", "TPU v5p", 95.74, 2765, 459, 3),
    "v6e": _tpu("v6e", "TPU v6e", 31.25, 1640, 918, 2),
}
_SAME = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}
_PLANES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
    **{1024: "8x8x16", 2048: "8x16x16"},
}
_WRITTEN = re.compile(r"([a-z]\w*?)(?:([:=_])(\d+(?:x\d+)*)|-(\d+))?")


@dataclass(frozen=True)
class Topology:
    """So many devices of a kind, connected as they are.

    Attributes:
      name: such as `v5e:16x16`.
      chip: what each device is.
      shape: of the grid; (8,) for eight that are only counted.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def n_devices(self) -> int:
        """Of all hosts together."""
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """Bytes that a program may use on one device."""
        if self.chip.platform == "cpu":
            return _machine_memory() // self.n_devices
        return int(self.chip.memory * memory_fraction()) if self.chip.platform == "gpu" else self.chip.memory


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes: `$XLA_PYTHON_CLIENT_MEM_FRACTION`, else three quarters."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_topology(text: str) -> Topology:
    """Reads `cpu:8`, `h100:8`, `v5e:16x16`, `v5p:4x4x4`, or a name of Cloud TPU such as `v5litepod-16` or `v5p-128`.

    The cloud counts two cores a chip on v4 and v5p, which compute as one device: `v5p-128` is 64 devices.

    Raises:
      TopologyError: an unknown name or a grid that there is not, with the nearest.

    Example:
      >>> [parse_topology(text).name for text in ("cpu:8", "v5litepod-16", "v5p-128", "V6E:16x16")]
      ['cpu:8', 'v5e:4x4', 'v5p:4x4x4', 'v6e:16x16']
      >>> parse_topology("v5p-128").n_devices
      64
    """
    found = _WRITTEN.fullmatch(text.strip().lower())
    kind = _SAME.get(found[1], found[1]) if found else ""
    if found is None or kind not in CHIPS:
        raise TopologyError(f"there is no topology {text!r}; nearest: {', '.join(nearest(text, examples()))}.")
    chip, grid, count = CHIPS[kind], found[3], found[4]
    if count is not None:
        return _from_cloud(text, kind, chip, int(count))
    shape = tuple(map(int, (grid or "1").split("x")))
    if grid is None and chip.platform == "tpu":
        raise TopologyError(f"{text!r} names no grid; write {', '.join(nearest(text, examples()))}.")
    if 0 in shape:
        raise TopologyError(f"{text!r} has no devices; write at least 1.")
    if len(shape) != chip.n_dimensions:
        form = "x".join(["A", "B", "C"][: chip.n_dimensions]) if chip.platform == "tpu" else "N"
        raise TopologyError(f"{text!r}: a topology of {kind} is written {kind}:{form}.")
    return Topology(f"{kind}:{'x'.join(map(str, shape))}", chip, shape)


def _from_cloud(text: str, kind: str, chip: Chip, count: int) -> Topology:
    if chip.platform != "tpu":
        raise TopologyError(f"{text!r}: write {kind}:{count}.")
    grids = _CUBES if chip.cores_in_name else _PLANES
    per_chip = 2 if chip.cores_in_name else 1
    if count % per_chip or count // per_chip not in grids:
        sizes = ", ".join(f"{kind}-{n * per_chip}" for n in grids)
        raise TopologyError(f"there is no {text!r}; the sizes are {sizes}.")
    grid = grids[count // per_chip]
    return Topology(f"{kind}:{grid}", chip, tuple(map(int, grid.split("x"))))


def examples() -> list[str]:
    """Names that can be written."""
    names = ["cpu:1", "cpu:8", "h100:1", "h100:8"]
    for kind, chip in CHIPS.items():
        if chip.platform == "tpu":
            grids, per_chip = (_CUBES, 2) if chip.cores_in_name else (_PLANES, 1)
            names += [f"{kind}:{grid}" for grid in grids.values()] + [f"{kind}-{n * per_chip}" for n in grids]
    return names + [f"v5litepod-{n}" for n in _PLANES]


def missing(topology: Topology) -> str | None:
    """None where this environment can compile for a topology, else one line that says what to install.

    Example:
      >>> missing(parse_topology("cpu:8"))
    """
    version = importlib.metadata.version("jax")
    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return f"compiling for {topology.name} needs libtpu, and no TPU: pip install 'jaxdl[plan-tpu]'."
    if topology.chip.platform == "gpu" and not any(_has_plugin(cuda, version) for cuda in (12, 13)):
        return (
            f"compiling for {topology.name} needs the CUDA plug-in of jax {version}, and no GPU: "
            "pip install 'jaxdl[plan-gpu]'."
        )
    return None


def _has_plugin(cuda: int, version: str) -> bool:
    try:
        names = (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt")
        return all(importlib.metadata.version(name) == version for name in names)
    except importlib.metadata.PackageNotFoundError:
        return False


def environment(topology: Topology) -> dict[str, str]:
    """What a process that compiles for a topology needs in its environment, before it imports JAX."""
    common = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if topology.chip.platform == "cpu":
        return {**common, "JAX_NUM_CPU_DEVICES": str(topology.n_devices)}
    if topology.chip.platform == "gpu":
        return common
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_ID": "0"}
    return {**common, **quiet, "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def devices(topology: Topology) -> list[Any]:
    """The devices that XLA compiles for; nothing can run on those of a TPU or a GPU.

    Raises:
      TopologyError: the extra is missing, libtpu refuses the grid, or this process has fewer CPU devices.
    """
    import jax
    from jax.experimental import topologies

    if told := missing(topology):
        raise TopologyError(told)
    if topology.chip.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.n_devices:
            raise TopologyError(f"{topology.name}: this process shows {len(found)} CPU devices.")
        return found[: topology.n_devices]
    try:
        if topology.chip.platform == "gpu":
            return list(
                topologies.get_topology_desc(
                    platform="cuda", target_config=H100_TARGET.read_text(), topology=_gpu_grid(topology)
                ).devices
            )
        name, options = f"{topology.chip.libtpu}:{topology.name.partition(':')[2]}", _tpu_options(topology)
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        near = ", ".join(nearest(topology.name, examples()))
        raise TopologyError(f"there is no topology {topology.name}; nearest: {near}. The compiler: {said}") from None


def _gpu_grid(topology: Topology) -> str:
    """Slices x hosts x GPUs of a host."""
    n = topology.n_devices
    if n > GPUS_PER_HOST and n % GPUS_PER_HOST:
        raise TopologyError(f"{topology.name}: hosts have {GPUS_PER_HOST} GPUs; write a multiple of {GPUS_PER_HOST}.")
    return f"1x{max(1, n // GPUS_PER_HOST)}x{min(n, GPUS_PER_HOST)}"


def _tpu_options(topology: Topology) -> dict[str, Any]:
    """Where the links go round: without them XLA compiles all-gathers as all-reduces."""
    grid = (*topology.shape, 1)[:3]
    if topology.chip.n_dimensions == 3:
        rings = [all(size % 4 == 0 for size in grid)] * 3
    else:
        rings = [size == 16 for size in grid]
    options: dict[str, Any] = {"wrap": rings}
    if topology.n_devices == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if topology.chip.libtpu == "v4":
        options["chip_config_name"] = "megacore"
    return options
