"""The store of checkpoints on disk.

A step is `<directory>/<step>/`: Orbax's files, and `manifest.json`, which is written last. A folder without a valid
manifest is not a checkpoint.
"""

import concurrent.futures
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from jaxdl.checkpoint import arrays as disk
from jaxdl.checkpoint import folders
from jaxdl.checkpoint import manifest as manifests
from jaxdl.checkpoint.folders import Skipped
from jaxdl.checkpoint.leaves import add_hashes, describe, differences, not_finite, place, to_host
from jaxdl.checkpoint.manifest import CheckpointCorrupt, CheckpointError, CheckpointMismatch, LeafRecord, Manifest
from jaxdl.parallel import processes, watchdog
from jaxdl.paths import Tree, flatten, nearest

SAVE_DEADLINE_S = 1800.0  # that the other processes give the first one to write a checkpoint


class Restored(NamedTuple):
    """What `Store.restore` gives: the state, its step and metadata, and the damaged steps that were passed over."""

    state: Tree
    step: int
    metadata: dict[str, Any]
    skipped: Skipped


class Store:
    """Saves states in the background, verifies them when they are read, and keeps the last and the best.

    Use it as a context manager, or call `close`: a save that still runs when Python exits may be lost. One process
    writes a directory at a time.

    Where a run has many processes, all of them call `save`, `wait` and `restore` together. The first one gathers the
    state in its host memory, leaf by leaf, and writes; every process reads, so all must see the directory.

    Args:
      directory: made when needed.
      keep_last: how many of the newest checkpoints to keep; None keeps all.
      keep_best: how many of the best by `best_metric` to keep beside those.
      best_metric: a name in the `metrics` of `save`; without it nothing is best.
      best_mode: "max" or "min".

    Raises:
      CheckpointError: an argument is out of range.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as directory, Store(directory) as store:
      ...     store.save(1, {"w": jnp.arange(3.0)}, metadata={"note": "first"})
      ...     store.restore({"w": jnp.zeros(3)})
      Restored(state={'w': Array([0., 1., 2.], dtype=float32)}, step=1, metadata={'note': 'first'}, skipped=())
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = 3,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: str = "max",
    ):
        problems = []
        if keep_last is not None and keep_last < 1:
            problems.append(f"keep_last={keep_last} must be at least 1, or None to keep all.")
        if keep_best < 0:
            problems.append(f"keep_best={keep_best} must not be negative; 0 keeps none for its score.")
        if best_mode not in ("max", "min"):
            problems.append(f'best_mode={best_mode!r} must be "max" or "min".')
        if problems:
            raise CheckpointError.listing("checkpoint store", problems)
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._best_metric, self._best_mode = best_metric, best_mode
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jaxdl-checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._saving: int | None = None  # the step whose save has not been waited for, in every process
        self._writer: disk.Writer | None = None
        self._is_closed = False
        self._good: set[int] = set()  # written or verified by this process
        self._bad: set[int] = set()  # found damaged by this process

    def save(
        self,
        step: int,
        state: Tree,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Copies the state, and writes the copy in the background; waits first for the save before.

        Args:
          step: the name of the folder.
          state: arrays, typed keys and numbers; it may be donated as soon as this returns.
          metadata: JSON, given back by `restore`.
          metrics: name to number (or nested lists), kept in the manifest. If it is given, `best_metric` must be in it.

        Raises:
          CheckpointError: the save before failed; the state is not finite; the step is saved already; the directory
            cannot be written; metadata is not JSON. In every case the earlier checkpoints are intact.
        """
        self.wait()
        arrays, records = to_host(state, is_kept=processes.is_first())

        def begin() -> None:
            number = self._checked(step)
            content = Manifest(number, {}, {}, manifests.to_json("metadata", metadata), self._to_metrics(metrics))
            if problems := not_finite(arrays):
                raise CheckpointError.listing(f"step {number} is not saved: its state is not finite", problems)
            disk.nest(arrays)  # names that clash are told of now, not by the background
            self._make_room(number)
            self._pending = self._pool.submit(self._write, content, arrays, records)

        processes.led(f"the save of step {step}", begin, error=CheckpointError)
        self._saving = step

    def _checked(self, step: int) -> int:
        if self._is_closed:
            raise CheckpointError(f"step {step} is not saved: the store {self.directory} is closed.")
        if int(step) != step or step < 0:
            raise CheckpointError(f"step={step} must be a whole number, not negative.")
        folder = self.directory / str(int(step))
        if folder.exists() and int(step) not in self._bad and folders.damage(folder) is None:
            raise CheckpointError(
                f"step {step} is in {self.directory} already; restore the newest step to train on from it, "
                "or save in another directory."
            )
        return int(step)

    def _to_metrics(self, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
        known, name = manifests.to_json("metrics", metrics), self._best_metric
        if known and name is not None and not isinstance(known.get(name, ""), (int, float, type(None))):
            near = ", ".join(nearest(name, known))
            raise CheckpointError(f"best_metric={name!r} is not a number in the metrics of this save; nearest: {near}.")
        return known

    def _make_room(self, step: int) -> None:
        probe = self.directory / ".jaxdl-probe"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"Orbax reports an unwritable folder late and at length.")
            probe.unlink()
            folders.discard(self.directory / str(step))
            folders.discard(folders.unfinished(self.directory, step))
        except OSError as error:
            raise self._failure(step, error) from None

    def _write(self, content: Manifest, arrays: dict[str, np.ndarray], records: dict[str, LeafRecord]) -> None:
        folder = self.directory / str(content.step)
        try:
            self._writer = self._writer or disk.Writer()
            self._writer.start(folder, {p: array for p, array in arrays.items() if array.size})
            leaves = add_hashes(records, arrays)
            self._writer.wait()
            manifests.write(folder, content._replace(leaves=leaves, files=manifests.hash_files(folder)))
        except Exception as error:
            raise self._failure(content.step, error) from None
        self._good.add(content.step)
        self._bad.discard(content.step)
        try:
            self._retire(content.step)
        except OSError as error:
            raise CheckpointError(
                f"step {content.step} is saved, but an older one cannot be deleted: {error}."
            ) from None

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        for folder in (self.directory / str(step), folders.unfinished(self.directory, step)):
            try:
                folders.discard(folder)
            except OSError:  # what is left has no manifest, and the next save of the step replaces it
                continue
        reason = str(error) if isinstance(error, CheckpointError) else disk.one_line(error)
        return CheckpointError(
            f"step {step} could not be saved in {self.directory}: {reason} Earlier checkpoints are intact; "
            "save again when the cause (a full disk?) is gone."
        )

    def _retire(self, saved: int) -> None:
        while True:
            scores = self._scores()
            kept = folders.retained(
                scores, keep_last=self._keep_last, keep_best=self._keep_best, best_mode=self._best_mode
            ) | {saved}
            unsure = kept - self._good if scores.keys() - kept else set()
            bad = {step for step in unsure if folders.damage(self.directory / str(step)) is not None}
            self._good |= unsure - bad
            self._bad |= bad
            if not bad:
                break
        for step in scores.keys() - kept:
            folders.discard(self.directory / str(step))
        folders.sweep(self.directory, up_to=saved)

    def _scores(self) -> dict[int, float | None]:
        found = {step: m.metrics for step, m in folders.complete(self.directory).items() if step not in self._bad}
        scores = {step: metrics.get(self._best_metric or "") for step, metrics in found.items()}
        return {step: score if isinstance(score, (int, float)) else None for step, score in scores.items()}

    def restore(
        self, like: Tree | Callable[[int], Tree], *, step: int | None = None, on_note: Callable[[str], object] = print
    ) -> Restored:
        """Reads the newest intact checkpoint, every byte of it verified.

        Args:
          like: the state to fill, abstract (`jax.eval_shape`) or concrete; where steps differ in structure, a function
            that gives it by step. Leaves with a sharding they are committed to are placed on it, the others like fresh
            arrays.
          step: read this step, and no other if it is damaged; None walks back from the newest.
          on_note: is told of every damaged step that is passed over.

        Raises:
          CheckpointMismatch: the checkpoint is one of another model; lists every difference.
          CheckpointCorrupt: no step is intact (or the one asked for is not); lists each with its damage.
          CheckpointError: there is no checkpoint.
        """
        self._settle()
        like_at = like if callable(like) else lambda _: like

        def read(folder: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
            return self._read(folder, describe(like_at(int(folder.name))))

        if step is None:
            (manifest, arrays), _, skipped = folders.walk_back(self.directory, read, on_note=on_note)
        else:
            manifest, arrays = self._read_one(step, read)
            skipped = ()
        remedy = f"all must see the same folder {self.directory}."
        processes.agree("the checkpoint to go on from", manifest.step, remedy)
        like = like_at(manifest.step)
        leaves = [place(arrays.pop(path), manifest.leaves[path], leaf) for path, leaf in flatten(like).items()]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(state, manifest.step, manifest.metadata, skipped)

    def _read(self, folder: Path, wanted: dict[str, LeafRecord]) -> tuple[Manifest, dict[str, np.ndarray]]:
        try:
            manifest = folders.read_manifest(folder)
            if problems := differences(manifest.leaves, wanted):
                raise CheckpointMismatch.listing(f"{folder} is not a checkpoint of this model", problems)
            manifests.verify(folder)
            arrays = disk.read(folder, manifest.leaves)
            manifests.check_leaves(manifest.leaves, arrays)
        except CheckpointCorrupt:
            self._bad.add(int(folder.name))
            raise
        self._good.add(manifest.step)
        return manifest, arrays

    def _read_one(self, step: int, read: Callable[[Path], tuple[Manifest, dict[str, np.ndarray]]]) -> Any:
        steps = ", ".join(str(other) for other in self.steps() if other != step) or "none"
        if step not in folders.step_numbers(self.directory):
            raise CheckpointError(f"step {step} is not in {self.directory}; steps there: {steps}.")
        try:
            return read(self.directory / str(step))
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"step {step} in {self.directory}: {error}. Other steps there: {steps}.") from None

    def steps(self) -> list[int]:
        """The steps with a valid manifest, in ascending order, less those that this store has found damaged."""
        return list(self._scores())

    def damaged(self) -> dict[int, str]:
        """The step folders that are no checkpoints, with the reason, in ascending order; reads every file of all."""
        self._settle()
        reasons = {step: folders.damage(self.directory / str(step)) for step in folders.step_numbers(self.directory)}
        return {step: reason for step, reason in reasons.items() if reason is not None}

    def best_step(self) -> int | None:
        """The step with the best `best_metric`, the later of two equal ones; None if no step has a score."""
        ranked = folders.ranking(self._scores(), best_mode=self._best_mode)
        return ranked[0] if ranked else None

    def check(self) -> None:
        """Raises the error of a background save that has failed; does not wait.

        Raises:
          CheckpointError: the save failed; it is raised once.
        """
        if self._pending is None or not self._pending.done():
            return
        if watchdog.current() is None:
            self.wait()
        elif (error := self._pending.exception()) is not None:
            self._pending = self._saving = None
            raise error

    def wait(self) -> None:
        """Returns when the last save is complete, its manifest included.

        Raises:
          CheckpointError: the save failed; it is raised once, and later saves work again.
        """
        step, pending = self._saving, self._pending
        self._saving = None
        if step is not None:
            name, deadline_s = f"the end of the save of step {step}", SAVE_DEADLINE_S
            processes.led(name, self._settled, error=CheckpointError, deadline_s=deadline_s)
        elif pending is not None:
            self._settled()

    def _settled(self) -> None:
        pending = self._settle()
        self._pending = None
        if pending is not None:
            pending.result()

    def _settle(self) -> concurrent.futures.Future[None] | None:
        if self._pending is not None:
            concurrent.futures.wait([self._pending])
        return self._pending

    def close(self) -> None:
        """Waits for the last save and ends the background threads; restoring works on.

        Raises:
          CheckpointError: the last save failed.
        """
        self._is_closed = True
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._saving = None  # the other processes may not come here
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
