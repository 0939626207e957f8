"""Runs `experiments.classify_images` and writes down, outside of jaxdl, which rows each step was given.

    python -m tests.faults.logged_rows LOG --config ...

It wraps two functions from without, so that jaxdl needs no hook for it: `Pipeline.__getitem__`, which makes the batch
of a step, and the iterator of `prefetch`, from which the loop takes the batches in the order it trains on them.
A line `step<TAB>row ids<TAB>sha256 of the batch's bytes` is appended when the batch is taken; a batch that was read
ahead and never taken leaves no line. One system call a line: a kill tears none.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from experiments import classify_images
from jaxdl import feed
from jaxdl.command import run_command
from jaxdl.data import Pipeline


def digest(batch: dict[str, np.ndarray]) -> str:
    """The sha256 of a batch, augmentation included.

    Example:
      >>> digest({"x": np.zeros(2)}) == digest({"x": np.ones(2)})
      False
    """
    content = hashlib.sha256()
    for name, array in sorted(batch.items()):
        content.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return content.hexdigest()


def watch(log: int) -> None:
    """Wraps the two functions; `log` is an open file descriptor."""
    make: Callable[..., Any] = Pipeline.__getitem__
    read_ahead: Callable[..., Any] = feed.prefetch
    lines: dict[int, bytes] = {}

    def made(self: Pipeline, step: int) -> Any:
        batch = make(self, step)
        rows = " ".join(map(str, self.rows(step)))
        lines[step] = f"{step}\t{rows}\t{digest(batch)}\n".encode()
        return batch

    def taken(data: Any, first: int, stop: int, **options: Any) -> Generator[Any, None, None]:
        batches = read_ahead(data, first, stop, **options)
        try:
            for step, batch in enumerate(batches, first):
                os.write(log, lines.pop(step))
                yield batch
        finally:
            batches.close()

    Pipeline.__getitem__ = made  # type: ignore[method-assign]
    feed.prefetch = taken


def main() -> int:
    name, *argv = sys.argv[1:]
    watch(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    return run_command(classify_images.Config, classify_images.experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
