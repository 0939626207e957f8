"""What a run ran on, as far as it can be told."""

import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxdl")


def environment(directory: str | os.PathLike[str] = ".") -> dict[str, str]:
    """Versions, machine and source, for the report and for whoever repeats the run.

    Starts JAX's backend if nothing has yet. Never raises: what cannot be told says so.

    Args:
      directory: where to look for a git repository.

    Returns:
      name -> text: `python`, the versions of `jax`, `jaxlib`, `flax`, `optax`, `orbax-checkpoint`, `numpy` and `jaxdl`,
      `platform`, `cpu`, `devices` ("8 x cpu (cpu)"), `processes`, and `git`: the commit, with "with uncommitted
      changes" if there are any, or "not a git repository".

    Example:
      >>> sorted(environment())[:4]
      ['cpu', 'devices', 'flax', 'git']
    """
    found = {"python": _told(platform.python_version)}
    for package in _PACKAGES:
        found[package] = _told(partial(metadata.version, package), otherwise="not installed")
    found["platform"] = _told(platform.platform)
    found["cpu"] = _told(_cpu)
    found["devices"] = _told(_devices)
    found["processes"] = _told(_processes)
    found["git"] = _told(lambda: _git(Path(directory)), otherwise="not a git repository")
    return found


def _told(ask: Callable[[], Any], otherwise: str = "unknown") -> str:
    try:
        return str(ask()) or otherwise
    except Exception:  # a report about a run must not end it
        return otherwise


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores"


def _devices() -> str:
    import jax

    kinds = [f"{device.device_kind} ({device.platform})" for device in jax.devices()]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def _processes() -> int:
    import jax

    return jax.process_count()


def _git(directory: Path) -> str:
    is_dirty = bool(_run_git(directory, "status", "--porcelain"))
    try:
        commit = _run_git(directory, "rev-parse", "--verify", "HEAD")
    except subprocess.CalledProcessError:
        commit = "no commit yet"
    return f"{commit} with uncommitted changes" if is_dirty else commit


def _run_git(directory: Path, *words: str) -> str:
    """git's answer; it is asked to take no locks, for it may run beside the user's own git."""
    command = ["git", "--no-optional-locks", "-C", str(directory), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
