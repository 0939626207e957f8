"""Named NumPy arrays to and from a folder: the only use of Orbax in the library.

Orbax gets nested dicts of host arrays, so that any topology, and plain Orbax without jaxdl, can read them.
"""

import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdl.checkpoint.manifest import CheckpointCorrupt, CheckpointError, LeafRecord
from jaxdl.paths import flatten

_LOGGERS = ("absl", "asyncio")  # Orbax logs to the first; its failed tasks are reported to the second
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax appends to a folder that it has not committed


class Writer:
    """Writes arrays in the background, one folder at a time, and keeps Orbax's log messages to itself.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     writer = Writer()
      ...     writer.start(Path(name, "7"), {"dense/kernel": np.float32([1, 2])})
      ...     writer.wait()
      ...     writer.close()
      ...     read(Path(name, "7"), {"dense/kernel": LeafRecord((2,), "float32")})
      {'dense/kernel': array([1., 2.], dtype=float32)}
    """

    def __init__(self) -> None:
        self._filter = _NotFromOrbax()
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._filter)
        _hear_no_closed_loop()
        # Directories made in the background leave threads that wait for ten minutes when that fails, at exit too.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(_handler(), async_options=options, multiprocessing_options=_alone())

    def start(self, folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
        """Starts to write `arrays` into a folder that does not exist yet; `wait` first for the one before.

        Raises:
          CheckpointError: two names cannot be told apart on disk.
          Exception: any error of Orbax.
        """
        self._orbax.save(folder, args=ocp.args.PyTreeSave(nest(arrays)))

    def wait(self) -> None:
        """Returns when the folder is complete.

        Raises:
          Exception: any error of Orbax; `abandon` the writer then.
        """
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Ends the background threads."""
        self._orbax.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._filter)

    def abandon(self) -> None:
        """Ends the background threads after an error, as far as they can be; late messages stay unheard."""
        try:
            self._orbax.close()
        except Exception:  # the error that `wait` has raised already
            return


def read(folder: Path, records: Mapping[str, LeafRecord]) -> dict[str, np.ndarray]:
    """Reads the named arrays, and only these, whole into host memory.

    Args:
      folder: what `Writer.start` was given.
      records: the wanted paths; those without elements are made, as they are not on disk.

    Raises:
      CheckpointCorrupt: whatever Orbax raised, or an array that is not there.

    Example: see `Writer`.
    """
    empty = {path for path, record in records.items() if 0 in record.shape}
    wanted = nest({path: 0 for path in records if path not in empty})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    try:
        with _quiet(), ocp.Checkpointer(_handler(), multiprocessing_options=_alone()) as orbax:
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
            found = flatten(orbax.restore(folder, args=args)) if wanted else {}
    except Exception as error:
        raise CheckpointCorrupt(f"the arrays cannot be read: {one_line(error)}") from None
    if absent := [path for path in records if path not in empty and not isinstance(found.get(path), np.ndarray)]:
        raise CheckpointCorrupt(f"not on disk: {', '.join(absent)}")
    dtypes = {path: jax.numpy.dtype(records[path].dtype) for path in empty}
    return {path: np.zeros(records[path].shape, dtypes[path]) if path in empty else found[path] for path in records}


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())


def _alone() -> ocp.options.MultiprocessingOptions:
    """A process reads and writes whole arrays by itself: Orbax must not wait for others."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts out of paths.

    Raises:
      CheckpointError: a path is a leaf and a folder at once, or two differ in `.` and `/` only (Orbax joins with `.`).

    Example:
      >>> nest({"dense/kernel": 1, "dense/bias": 2, "step": 3})
      {'dense': {'kernel': 1, 'bias': 2}, 'step': 3}
    """
    names = Counter(path.replace("/", ".") for path in flat)
    prefixes = {path[:i] for path in flat for i, letter in enumerate(path) if letter == "/"}
    clashes = [path for path in flat if path in prefixes or names[path.replace("/", ".")] > 1]
    if clashes:
        raise CheckpointError(f"these paths clash on disk: {', '.join(clashes)}; rename keys that hold '.' or '/'.")
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def one_line(error: BaseException) -> str:
    """The class and the first line of an error, at most 300 characters.

    Example:
      >>> one_line(ValueError("bad\\nvery"))
      'ValueError: bad'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300].removesuffix(": ")


class _NotFromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname + record.getMessage()


@functools.cache
def _hear_no_closed_loop() -> None:
    """Orbax closes its event loop when a write fails; each write that ends after it would print a traceback."""
    heard = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            heard(unraisable)

    sys.unraisablehook = hook


@contextmanager
def _quiet() -> Iterator[None]:
    silence = _NotFromOrbax()
    logging.getLogger("absl").addFilter(silence)
    try:
        yield
    finally:
        logging.getLogger("absl").removeFilter(silence)
