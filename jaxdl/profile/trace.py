"""What `jax.profiler` wrote: when each operation of a program ran, on which device, and what Python did meanwhile.

On a CPU the operations of a device are on the threads of the host. XLA's thread pool notes when a thread schedules a
task and when another runs it, so that the work of helping threads goes to the operation that asked for it.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxdl.errors import JaxdlError
from jaxdl.tracing import INPUT

_DERIVED = {"XLA Modules", "Steps", "Framework Name Scope", "Framework Ops", "Source code", "XLA TraceMe"}
_DERIVED |= {"TensorFlow Ops", "TensorFlow Name Scope", "Launch Stats"}
_START, _STOP, _RECORD = (f"ThreadpoolListener::{name}" for name in ("StartRegion", "StopRegion", "Record"))
_NO_OPERATION = re.compile(r"end: |ThunkExecutor|Wait|Rendezvous|InvokeRendezvous|\$|PjitFunction|SlinkyThreadPool")


class ProfileError(JaxdlError):
    """A profile that cannot be taken, or a trace that does not show what it should."""

    exit_code = 1


class Key(NamedTuple):
    """An operation of a program."""

    module: str
    name: str


@dataclass(frozen=True)
class Event:
    """A stretch of time in which a lane of a device, a thread or a stream, worked on an operation.

    Attributes:
      device: its number.
      lane: the thread or the stream.
      start, end: nanoseconds.
      key: the operation.
      run: of the program, a number that its events share; None where the trace has none.
      is_task: of a thread that helps, or a further kernel of an operation; no call of its own.
    """

    device: int
    lane: str
    start: float
    end: float
    key: Key
    run: int | None = None
    is_task: bool = False


class Trace(NamedTuple):
    """Events of the devices, and the spans (start, end) in which Python waited for a batch."""

    events: list[Event]
    waits: list[tuple[float, float]]


def read(folder: Path) -> Trace:
    """Reads the newest trace below a folder.

    Raises:
      ProfileError: there is none.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ProfileError(f"there is no trace (*.xplane.pb) below {folder}; take one with jax.profiler.start_trace.")
    return from_planes(ProfileData.from_file(str(files[-1])).planes)


def from_planes(planes: Iterable[Any]) -> Trace:
    """The same of `jax.profiler.ProfileData.planes`."""
    planes = list(planes)
    events: list[Event] = []
    for plane in planes:
        if found := re.match(r"/device:\w+:(\d+)", plane.name):
            events += _of_accelerator(int(found[1]), list(plane.lines))
    host = [line for plane in planes if plane.name.startswith("/host:CPU") for line in plane.lines]
    if not events:
        events = _of_threads([(str(line.name), list(line.events)) for line in host])
    waits = [(e.start_ns, e.start_ns + e.duration_ns) for line in host for e in line.events if e.name == INPUT]
    return Trace(sorted(events, key=lambda event: (event.start, -event.end)), sorted(waits))


def _of_accelerator(device: int, lines: list[Any]) -> Iterator[Event]:
    """A TPU has a line of operations; a GPU has one for each stream, with the kernels and copies of each operation."""
    own = [line for line in lines if line.name == "XLA Ops"]
    for line in own or [line for line in lines if line.name not in _DERIVED]:
        last = None
        for event in sorted(line.events, key=lambda event: event.start_ns):
            stats, start = dict(event.stats), event.start_ns
            name = str(stats.get("hlo_op") or event.name.partition(" = ")[0].lstrip("%"))
            key = Key(str(stats.get("hlo_module", "")).partition("(")[0], name)
            goes_on = not own and key == last and "hlo_op" in stats
            yield Event(device, line.name, start, start + event.duration_ns, key, stats.get("run_id"), goes_on)
            last = key


# ---- threads of a CPU ----


class _Open(NamedTuple):
    """An operation or a task that a thread is in."""

    start: float
    end: float
    device: int
    key: Key
    run: int | None
    task: int | None


def _of_threads(lines: list[tuple[str, list[Any]]]) -> list[Event]:
    opened: list[tuple[str, _Open]] = []
    parents: dict[int, _Open | None] = {}
    for lane, events in lines:
        found = sorted(_opened(events), key=lambda one: (one.start, -one.end))
        opened += [(lane, one) for one in found]
        points = sorted((e.start_ns, dict(e.stats).get("_p", -1)) for e in events if e.name == _RECORD)
        parents.update(_around(found, points))
    made = []
    for lane, one in opened:
        owner = one if one.task is None else _owner(one.task, parents)
        if owner is not None:  # else a task of the runtime, which is no work of the program's
            is_task = one.task is not None
            made.append(Event(owner.device, lane, one.start, one.end, owner.key, owner.run, is_task))
    return made


def _opened(events: list[Any]) -> Iterator[_Open]:
    open_tasks: list[tuple[float, int]] = []
    for event in sorted(events, key=lambda event: event.start_ns):
        if event.name == _START:
            open_tasks.append((event.start_ns, dict(event.stats).get("_c", -1)))
        elif event.name == _STOP:
            if open_tasks:
                start, task = open_tasks.pop()
                yield _Open(start, event.start_ns, -1, Key("", ""), None, task)
        elif not _NO_OPERATION.match(event.name):
            stats = dict(event.stats)
            if "hlo_op" in stats:
                key = Key(str(stats.get("hlo_module", "")), str(stats["hlo_op"]))
                end = event.start_ns + event.duration_ns
                yield _Open(event.start_ns, end, int(stats.get("device_ordinal", 0)), key, stats.get("run_id"), None)


def _around(found: list[_Open], points: list[tuple[float, int]]) -> Iterator[tuple[int, _Open | None]]:
    """For each task that this thread scheduled, what it was in at that moment."""
    stack: list[_Open] = []
    at = 0
    for time, task in points:
        while at < len(found) and found[at].start <= time:
            stack = [one for one in stack if one.end > found[at].start]
            stack.append(found[at])
            at += 1
        stack = [one for one in stack if one.end >= time]
        yield task, stack[-1] if stack else None


def _owner(task: int, parents: dict[int, _Open | None]) -> _Open | None:
    """The operation that a task is of, through tasks that scheduled it."""
    for _ in range(100):
        one = parents.get(task)
        if one is None or one.task is None:
            return one
        task = one.task
    return None
