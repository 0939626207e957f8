"""Saving and reading back a state: how long a training loop waits, when the checkpoint is complete, bytes a second.

Everybody saves the same arrays on the same disk, and one checkpoint at a time. What was read back is compared once, and
so is what happens when a byte of the largest file has been flipped. Files come from the page cache: this is about the
libraries, not about the disk.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import BenchmarkError, Competitor, Result, Settings, measure, spread
from benchmarks.table import Table, not_run, time_cell

SIZES_MB = (100, 500)
LEAF = (1024, 1024)
OURS, ORBAX, TORCH = "jaxdl, every byte verified", "Orbax, asynchronous", "torch.save, torch.load"


def make_arrays(n_bytes: int, leaf: Sequence[int] = LEAF) -> dict[str, np.ndarray]:
    """Float32 leaves of one shape, about n bytes of them together.

    Example:
      >>> sorted(make_arrays(100, (3, 4)))
      ['layer_0', 'layer_1']
    """
    rng = np.random.default_rng(0)
    n_leaves = max(1, round(n_bytes / (4 * np.prod(leaf))))
    return {f"layer_{i}": rng.standard_normal(leaf, np.float32) for i in range(n_leaves)}


class _Side:
    """Saves and restores in rounds.

    Args:
      directory: where to.
      n_bytes: of the state, about.
      leaf: shape of its arrays.
    """

    state: Any

    def __init__(self, directory: str, n_bytes: int, leaf: Sequence[int] = LEAF) -> None:
        arrays = make_arrays(n_bytes, leaf)
        self.directory, self.step = Path(tempfile.mkdtemp(dir=directory)), 0
        self.open(arrays)
        self._save()
        found = self.restore(self.step)
        if not all(np.array_equal(np.asarray(found[name]), array) for name, array in arrays.items()):
            raise RuntimeError("what was read is not what was saved")
        flip_a_byte(self.directory)
        self.facts = {
            "bytes": sum(array.nbytes for array in arrays.values()),
            "flipped_byte": self._read_flipped(arrays),
        }
        self._discard()

    def round(self) -> dict[str, float]:
        """Seconds until a checkpoint is complete, of the loop's waiting, and of reading it."""
        stall_s, complete_s = self._save()
        start = time.perf_counter()
        self.restore(self.step)
        restore_s = time.perf_counter() - start
        self._discard()
        return {"seconds": complete_s, "stall_s": stall_s, "restore_s": restore_s}

    def _save(self) -> tuple[float, float]:
        self.step += 1
        start = time.perf_counter()
        self.save(self.step)
        stall_s = time.perf_counter() - start
        self.wait()
        return stall_s, time.perf_counter() - start

    def _read_flipped(self, arrays: dict[str, np.ndarray]) -> str:
        try:
            found = self.restore(self.step)
        except Exception:  # every library has its own
            return "refused"
        same = all(np.array_equal(np.asarray(found[name]), array) for name, array in arrays.items())
        return "harmless" if same else "not noticed"

    def _discard(self) -> None:
        path = self.path(self.step)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def path(self, step: int) -> Path:
        """The folder or file of a step."""
        return self.directory / str(step)

    def open(self, arrays: dict[str, np.ndarray]) -> None:
        """Makes the state that is saved, and what saves it."""
        raise NotImplementedError

    def save(self, step: int) -> None:
        """Returns when a training loop may go on, the state changed or donated."""
        raise NotImplementedError

    def wait(self) -> None:
        """Returns when the checkpoint is complete."""

    def restore(self, step: int) -> Any:
        """Name -> array, whole in memory."""
        raise NotImplementedError


def flip_a_byte(directory: Path) -> None:
    """In the middle of the largest file."""
    largest = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))


class Jaxdl(_Side):
    """`jaxdl.checkpoint.Store`."""

    def open(self, arrays: dict[str, np.ndarray]) -> None:
        import jax

        from jaxdl.checkpoint import Store

        self.store = Store(self.directory, keep_last=None)
        self.state = jax.block_until_ready(jax.device_put(arrays))

    def save(self, step: int) -> None:
        self.store.save(step, self.state)

    def wait(self) -> None:
        self.store.wait()

    def restore(self, step: int) -> Any:
        return self.store.restore(self.state, step=step).state


class Orbax(_Side):
    """`orbax.checkpoint.StandardCheckpointer`, which writes in the background."""

    def open(self, arrays: dict[str, np.ndarray]) -> None:
        import jax
        import orbax.checkpoint as ocp

        self.checkpointer = ocp.StandardCheckpointer()
        self.state = jax.block_until_ready(jax.device_put(arrays))
        self.like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)

    def save(self, step: int) -> None:
        self.checkpointer.save(self.path(step), self.state)

    def wait(self) -> None:
        self.checkpointer.wait_until_finished()

    def restore(self, step: int) -> Any:
        return self.checkpointer.restore(self.path(step), self.like)


class Torch(_Side):
    """`torch.save` and `torch.load`: the loop waits until the file is written."""

    def open(self, arrays: dict[str, np.ndarray]) -> None:
        import torch

        self.state = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def save(self, step: int) -> None:
        import torch

        torch.save(self.state, self.path(step))

    def restore(self, step: int) -> Any:
        import torch

        return torch.load(self.path(step))


def run(settings: Settings) -> list[Table]:
    """One table, three rows for each size."""
    made = Table(
        "Checkpoints",
        ["", "the loop waits", "until it is complete", "written, MB/s", "restored in", "read, MB/s", "a flipped byte"],
        notes=[
            "Complete is when `wait` returns: jaxdl's hashes and manifest are then on disk too. Nobody calls fsync."
        ],
    )
    for n_mb in SIZES_MB[:1] if settings.is_quick else SIZES_MB:
        with tempfile.TemporaryDirectory() as directory:
            options = {"directory": directory, "n_bytes": n_mb * 10**6}
            sides = {OURS: "Jaxdl", ORBAX: "Orbax", TORCH: "Torch"}
            rows = [Competitor(name, f"benchmarks.checkpoint:{side}", options) for name, side in sides.items()]
            results = measure(rows, settings)
        made.rows += [to_row(f"{n_mb} MB: {result.name}", result) for result in results]
        made.results = [*made.results, *results]
    return [made]


def to_row(name: str, result: Result) -> list[str]:
    """The cells of one competitor.

    Raises:
      BenchmarkError: jaxdl does not refuse a flipped byte.
    """
    if result.failure:
        return not_run(name, result.failure, 7)
    if result.name == OURS and result.facts["flipped_byte"] != "refused":
        raise BenchmarkError(f"{result.name}: a flipped byte was {result.facts['flipped_byte']}")
    restore, n_bytes = spread(result.figures("restore_s")), result.facts["bytes"]
    rates = [f"{n_bytes / seconds / 1e6:.0f}" for seconds in (result.median_s, restore.median)]
    waits, complete = time_cell(spread(result.figures("stall_s"))), time_cell(spread(result.seconds))
    return [name, waits, complete, rates[0], time_cell(restore), rates[1], result.facts["flipped_byte"]]
