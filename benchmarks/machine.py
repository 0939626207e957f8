"""What the figures were taken on, and how fast it multiplies matrices."""

import datetime
import os
import platform
import statistics
import time
from importlib import metadata

from benchmarks.harness import Child, Competitor

_PACKAGES = (
    "jaxdl",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "torch",
    "transformers",
    "peft",
    "keras",
)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, str]:
    """Name -> text: date, machine and versions. JAX is asked in a process of its own."""
    with Child(Competitor("machine", "benchmarks.machine:Machine")) as child:
        child.set_up()
        found = child.facts()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": found["cpu"],
        "cores": f"{n_cores()} usable, load {load} at the start",
        "devices": found["devices"],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "git": found["git"],
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class Machine:
    """Tells what JAX sees."""

    def __init__(self) -> None:
        from jaxdl.report.environment import environment

        self.facts = environment()


class Matmul:
    """Products of two square float32 matrices by XLA; a unit of work is one floating-point operation."""

    def __init__(self, size: int = 1536) -> None:
        import jax
        import jax.numpy as jnp

        use_full_float32()
        self.size, self.a = size, jnp.full((size, size), 1e-3)
        self.product = jax.jit(jnp.matmul)
        self.round(3)

    def round(self, n: int = 12) -> float:
        """Seconds of one operation, from the median of n products."""
        taken = []
        for _ in range(n):
            start = time.perf_counter()
            self.product(self.a, self.a).block_until_ready()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken) / (2 * self.size**3)


def use_full_float32() -> None:
    """On a GPU, JAX would otherwise multiply in TF32 and PyTorch would not."""
    import jax

    if jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "highest")
