"""The step folders of a directory: which are checkpoints, which to keep, and the walk back past damaged ones."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from jaxdl.checkpoint import manifest as manifests
from jaxdl.checkpoint.arrays import TEMPORARY
from jaxdl.checkpoint.manifest import CheckpointCorrupt, CheckpointError, Manifest

DELETING = ".deleting"
Result = TypeVar("Result")
Skipped = tuple[tuple[int, str], ...]


def step_numbers(directory: Path) -> list[int]:
    """The steps that have a folder, complete or not, in ascending order.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     for folder in ("10", "9", "best", "007"):
      ...         Path(name, folder).mkdir()
      ...     step_numbers(Path(name))
      [9, 10]
    """
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder, checked to be that of this step.

    Raises:
      CheckpointCorrupt: it is missing or damaged, or the folder holds another step.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     folder = Path(name, "9")
      ...     folder.mkdir()
      ...     manifests.write(folder, Manifest(8, {}, {}, {}, {}))
      ...     read_manifest(folder)
      Traceback (most recent call last):
      jaxdl.checkpoint.manifest.CheckpointCorrupt: the folder 9 holds step 8
    """
    manifest = manifests.read(folder)
    if str(manifest.step) != folder.name:
        raise CheckpointCorrupt(f"the folder {folder.name} holds step {manifest.step}")
    return manifest


def complete(directory: Path) -> dict[int, Manifest]:
    """The manifests of the steps that have a valid one, in ascending order; no other file is read.

    Example:
      >>> complete(Path("/nowhere"))
      {}
    """
    found = {}
    for step in step_numbers(directory):
        try:
            found[step] = read_manifest(directory / str(step))
        except CheckpointCorrupt:
            continue
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a step folder (`verify`), or None.

    Example:
      >>> damage(Path("/nowhere/7"))
      'no manifest.json: the save was cut off, or the copy is not complete'
    """
    try:
        read_manifest(folder)
        manifests.verify(folder)
    except CheckpointCorrupt as error:
        return str(error)
    return None


def walk_back(
    directory: Path, read: Callable[[Path], Result], *, on_note: Callable[[str], object]
) -> tuple[Result, int, Skipped]:
    """Reads the newest step that is intact.

    Args:
      directory: the store's.
      read: reads a step folder; `CheckpointCorrupt` sends the walk to the step before, other errors end it.
      on_note: is told of every step that is passed over.

    Returns:
      `(what read gave, its step, ((damaged step, reason), ...))`.

    Raises:
      CheckpointCorrupt: no step is intact; lists each with its damage.
      CheckpointError: the directory holds no step at all.

    Example:
      >>> walk_back(Path("/nowhere"), lambda folder: folder.name, on_note=print)
      Traceback (most recent call last):
      jaxdl.checkpoint.manifest.CheckpointError: /nowhere holds no checkpoint (no step folder).
    """
    skipped: list[tuple[int, str]] = []
    for step in reversed(step_numbers(directory)):
        try:
            result = read(directory / str(step))
        except CheckpointCorrupt as error:
            skipped.append((step, str(error)))
            on_note(f"The checkpoint of step {step} in {directory} is damaged, going back to an older one: {error}.")
        else:
            return result, step, tuple(skipped)
    if not skipped:
        raise CheckpointError(f"{directory} holds no checkpoint (no step folder).")
    lines = [f"step {step}: {reason}." for step, reason in skipped]
    raise CheckpointCorrupt.listing(f"{directory} holds no intact checkpoint", lines)


def discard(folder: Path) -> None:
    """Deletes a step folder if it is there; a kill in between leaves no half of it under its name.

    Raises:
      OSError: it cannot be deleted.

    Example:
      >>> discard(Path("/nowhere/7"))
    """
    if not folder.exists():
        return
    doomed = folder.with_name(folder.name + DELETING)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def unfinished(directory: Path, step: int) -> Path:
    """The folder that Orbax writes before it commits a step."""
    return directory / f"{step}{TEMPORARY}"


def sweep(directory: Path, *, up_to: int) -> None:
    """Deletes what killed saves and killed deletions of steps up to `up_to` left behind.

    Raises:
      OSError: it cannot be deleted.

    Example:
      >>> sweep(Path("/nowhere"), up_to=7)
    """
    for entry in list(directory.iterdir()) if directory.is_dir() else []:
        number, dot, rest = entry.name.partition(".")
        leftover = dot and (f".{rest}".endswith(DELETING) or f".{rest}" == TEMPORARY)
        if leftover and number.isdecimal() and int(number) <= up_to:
            shutil.rmtree(entry)


def ranking(scores: Mapping[int, float | None], *, best_mode: str) -> list[int]:
    """Steps from the best score to the worst; the later step wins a tie, steps without a score are left out.

    Example:
      >>> ranking({1: 0.5, 2: 0.9, 3: None, 4: 0.9}, best_mode="max")
      [4, 2, 1]
    """
    sign = 1.0 if best_mode == "max" else -1.0
    known = {step: sign * score for step, score in scores.items() if score is not None}
    return sorted(known, key=lambda step: (known[step], step), reverse=True)


def retained(
    scores: Mapping[int, float | None], *, keep_last: int | None, keep_best: int, best_mode: str = "max"
) -> set[int]:
    """The steps that retention keeps: the last ones and the best ones.

    Args:
      scores: `{step: metric or None}` of the good checkpoints.
      keep_last: how many of the newest; None keeps all.
      keep_best: how many of the best.
      best_mode: "max" or "min".

    Example:
      >>> sorted(retained({1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}, keep_last=1, keep_best=1))
      [2, 4]
    """
    newest = sorted(scores, reverse=True)
    return set(newest[:keep_last]) | set(ranking(scores, best_mode=best_mode)[:keep_best])
