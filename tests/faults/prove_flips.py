"""Flips single bytes of a checkpoint at random, and shows that each is found and the step before is restored.

    python -m tests.faults.prove_flips [--flips 100] [--seed 0]

Trains a few steps, then changes one bit of one byte of one file of the newest checkpoint, in a copy, restores, and
checks three things: the newest step was passed over with a reason, the restored values are those of the step before
(hash by hash), and without the flip the same restore takes the newest step. Every file is hit at least once; the
others are drawn at random. The exit code is 1 if any flip was missed.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdl.checkpoint import Store, arrays, folders, leaves
from tests.faults import evidence


class Flip(NamedTuple):
    """A bit of a file of a checkpoint folder."""

    name: str
    offset: int
    bit: int


class Outcome(NamedTuple):
    flip: Flip
    is_detected: bool
    is_restored: bool


def flip(path: Path, *, offset: int, bit: int) -> None:
    """Changes one bit of a file.

    Example:
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = Path(file.name).write_bytes(b"abc")
      ...     flip(Path(file.name), offset=1, bit=0)
      ...     Path(file.name).read_bytes()
      b'acc'
    """
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def draw(folder: Path, n: int, seed: int) -> list[Flip]:
    """Which bits to flip: each file of the folder once, then files by their size, uniformly over all bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(seed)
    chosen = [*rng.permutation(len(files)), *rng.choice(len(files), n, p=sizes / sizes.sum())][:n]
    return [
        Flip(files[i].relative_to(folder).as_posix(), int(rng.integers(sizes[i])), int(rng.integers(8))) for i in chosen
    ]


def blank(folder: Path) -> dict[str, Any]:
    """A state to restore into, of zeros, with the paths, shapes, dtypes and key types of a checkpoint."""

    def zero(record: Any) -> Any:
        if record.key_impl is not None:
            return jax.random.split(jax.random.key(0, impl=record.key_impl), record.shape)
        return np.zeros(record.shape, jax.numpy.dtype(record.dtype))

    return arrays.nest({path: zero(record) for path, record in folders.read_manifest(folder).leaves.items()})


def hashes(state: Any) -> dict[str, str]:
    """The sha256 of every leaf, as a manifest records them."""
    host, records = leaves.to_host(state)
    return {path: record.sha256 for path, record in leaves.add_hashes(records, host).items()}


def attempt(run: Path, change: Flip | None, workspace: Path) -> Outcome:
    """Restores from a copy of the two newest checkpoints, the newest with one bit flipped."""
    before, newest = evidence.steps(run)[-2:]
    copy = workspace / "copy"
    for step in (before, newest):
        shutil.copytree(run / "checkpoints" / str(step), copy / str(step))
    if change is not None:
        flip(copy / str(newest) / change.name, offset=change.offset, bit=change.bit)
    notes: list[str] = []
    with Store(copy) as store:
        restored = store.restore(blank(copy / str(before)), on_note=notes.append)
    shutil.rmtree(copy)
    want = folders.read_manifest(run / "checkpoints" / str(before)).leaves
    is_same = hashes(restored.state) == {path: record.sha256 for path, record in want.items()}
    is_detected = [step for step, _ in restored.skipped] == [newest] and f"step {newest}" in "".join(notes)
    return Outcome(change or Flip("", 0, 0), is_detected, restored.step == before and is_same)


def kind(name: str) -> str:
    """What sort of file it is: array data has random names."""
    return "array data" if "/d/" in f"/{name}" else Path(name).name


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table by kind of file, and the summary."""
    n, found, restored = (Counter[str]() for _ in range(3))
    for outcome in outcomes:
        n[kind(outcome.flip.name)] += 1
        found[kind(outcome.flip.name)] += outcome.is_detected
        restored[kind(outcome.flip.name)] += outcome.is_restored
    rows = [f"| {name} | {n[name]} | {found[name]} | {restored[name]} |" for name in sorted(n)]
    head = ["| file | flips | detected | restored from the step before |", "|---|---:|---:|---:|"]
    total = f"{n.total()} flips: {found.total()} detected, {restored.total()} restored from the step before"
    return "\n".join([*head, *rows, "", total])


def prove(run: Path, n: int, seed: int) -> list[Outcome]:
    """`n` flips, one at a time."""
    newest = run / "checkpoints" / str(evidence.steps(run)[-1])
    with tempfile.TemporaryDirectory() as workspace:
        if attempt(run, None, Path(workspace)).is_detected:
            raise SystemExit("the newest checkpoint is damaged before anything was flipped")
        return [attempt(run, change, Path(workspace)) for change in draw(newest, n, seed)]


def main(argv: Sequence[str] | None = None) -> int:
    from experiments import classify_images
    from jaxdl.command import run_command

    parser = argparse.ArgumentParser(description="single-byte flips in a checkpoint")
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", evidence.TINY_MLP, "--config.out", f"{folder}/run"]
        if code := run_command(classify_images.Config, classify_images.experiment, flags):
            return code
        outcomes = prove(Path(folder) / "run", options.flips, options.seed)
    print(f"\n{table(outcomes)}")
    return 0 if all(outcome.is_detected and outcome.is_restored for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
