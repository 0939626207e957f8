"""What a run folder proves: the hashes of its restored leaves, and whether its checkpoints are whole."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from jaxdl.checkpoint import arrays, folders, manifest

ROOT = Path(__file__).parents[2]
TINY_MLP = str(ROOT / "tests" / "faults" / "tiny_mlp.py")
SHORT_CNN = str(ROOT / "tests" / "faults" / "short_cnn.py")


class State(NamedTuple):
    """A restored checkpoint as `{path: sha256}`, by the part of the state that a path begins with."""

    step: int
    parts: dict[str, dict[str, str]]


def steps(run: Path) -> list[int]:
    """The steps with a valid manifest."""
    return list(folders.complete(run / "checkpoints"))


def damage(run: Path) -> dict[int, str]:
    """What is wrong with each step folder; every byte is read."""
    reasons = {step: folders.damage(run / "checkpoints" / str(step)) for step in steps(run)}
    return {step: reason for step, reason in reasons.items() if reason is not None}


def state(run: Path, step: int | None = None) -> State:
    """Reads a checkpoint back from the disk (the newest where `step` is None) and hashes every leaf."""
    step = max(steps(run)) if step is None else step
    folder = run / "checkpoints" / str(step)
    found = arrays.read(folder, manifest.verify(folder).leaves)
    parts: dict[str, dict[str, str]] = {}
    for path, array in sorted(found.items()):
        content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        parts.setdefault(path.partition("/")[0], {})[path] = hashlib.sha256(content).hexdigest()
    return State(step, parts)


def metric_log(run: Path) -> bytes:
    """The bytes of `metrics.jsonl`."""
    return (run / "metrics.jsonl").read_bytes()
