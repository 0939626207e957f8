"""What `tensorboardX` offers to write event files, imported without PyTorch.

`tensorboardX` imports PyTorch where that is installed, for tensors that jaxdl never gives it: one to three seconds, in
the middle of a run, and hundreds of megabytes.
"""

import functools
import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

_NAMES = ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")


class EventFiles(NamedTuple):
    """The modules of `tensorboardX` that are needed."""

    writer: ModuleType
    event: ModuleType
    summary: ModuleType


@functools.cache
def event_files() -> EventFiles:
    """`tensorboardX`, of which nobody else sees what was imported here: whoever imports it gets all of it.

    Example:
      >>> event_files().event.Event(step=3).step
      3
    """
    if {"torch", "tensorboardX"} & sys.modules.keys():
        return _load()
    hider = _WithoutTorch()
    sys.meta_path.insert(0, hider)
    try:
        return _load()
    finally:
        sys.meta_path.remove(hider)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboardX"]:
            del sys.modules[name]


def _load() -> EventFiles:
    return EventFiles(*(importlib.import_module(f"tensorboardX.{name}") for name in _NAMES))


class _WithoutTorch(MetaPathFinder):
    """Finds no PyTorch for the thread that made it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("PyTorch is not needed to write event files.", name=name)
        return None
