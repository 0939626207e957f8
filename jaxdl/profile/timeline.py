"""Whose time it was: at every moment of a step, the operations that a device works on share that moment."""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxdl.profile.trace import Event, Key, ProfileError, Trace

HOST, INPUT_WAIT, IDLE = "host", "input wait", "idle"


class Segment(NamedTuple):
    """A stretch in which a lane worked on one operation and nothing inside of it."""

    start: float
    end: float
    key: Key
    run: int


@dataclass
class Shares:
    """Where the time of usual calls went, in nanoseconds on one device (the mean of all).

    Attributes:
      operations: each operation's own time.
      counts: how often it began, on one device.
      idle: `HOST`: between two runs of a program while Python was not waiting for a batch, `INPUT_WAIT`: while it was,
        `IDLE`: within a run, between operations.
      calls: nanoseconds from the start of a call to that of the next, of every call on every device.
      usual: numbers of the calls that all but `calls` is of, see `usual_calls`.
      n_devices: that worked.
    """

    operations: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    idle: dict[str, float] = field(default_factory=lambda: {HOST: 0.0, INPUT_WAIT: 0.0, IDLE: 0.0})
    calls: list[float] = field(default_factory=list)
    usual: frozenset[int] = frozenset()
    n_devices: int = 0

    @property
    def total(self) -> float:
        """Nanoseconds of the usual calls: of the operations and idle together."""
        return sum(self.operations.values()) + sum(self.idle.values())


def shares(trace: Trace, n_calls: int, is_container: Callable[[Key], bool]) -> Shares:
    """Divides the time of the usual ones of `n_calls` calls among operations.

    A trace of one call more is needed: time goes from the start of the first call to the start of the last.

    Args:
      trace: of `n_calls + 1` calls.
      n_calls: at least 1.
      is_container: whether an operation only runs others, as a loop does; it counts where none of them runs.

    Raises:
      ProfileError: the trace shows no operations.
    """
    by_device: dict[int, list[Event]] = defaultdict(list)
    for event in trace.events:
        by_device[event.device].append(event)
    if not by_device:
        raise ProfileError(
            "the trace has no events of operations. On a CPU take it with a host_tracer_level of 1 or more; some "
            "versions of JAX need XLA_FLAGS=--xla_cpu_enable_xprof_traceme=true, too. On a GPU CUPTI must be there and "
            "allowed to trace (NVIDIA's ERR_NVGPUCTRPERM says how)."
        )
    bounds = {device: boundaries(events, n_calls + 1) for device, events in by_device.items()}
    calls = [[b - a for a, b in itertools.pairwise(starts)] for starts in bounds.values()]
    usual = usual_calls([sum(times) for times in zip(*calls, strict=True)])
    made = Shares(calls=[time for times in calls for time in times], usual=usual, n_devices=len(by_device))
    for device, events in by_device.items():
        _add_device(made, events, trace.waits, bounds[device], is_container)
    for counted in (made.operations, made.counts):
        for key in counted:
            counted[key] /= made.n_devices
    made.idle = {name: time / made.n_devices for name, time in made.idle.items()}
    return made


def usual_calls(times: Sequence[float]) -> frozenset[int]:
    """Numbers of the calls whose time is in the middle half; other work on the machine lengthens the rest.

    Example:
      >>> sorted(usual_calls([30, 10, 12, 11])), sorted(usual_calls([30, 10, 12]))
      ([2, 3], [0, 1, 2])
    """
    by_time = sorted(range(len(times)), key=lambda i: times[i])
    n_left_out = len(times) // 4
    return frozenset(by_time[n_left_out : len(times) - n_left_out])


def _add_device(
    made: Shares,
    events: Sequence[Event],
    waits: Sequence[tuple[float, float]],
    bounds: Sequence[float],
    is_container: Callable[[Key], bool],
) -> None:
    def is_usual(time: float) -> bool:
        return bisect.bisect_right(bounds, time) - 1 in made.usual

    for event in events:
        if is_usual(event.start) and not event.is_task:
            made.counts[event.key] += 1
    lanes: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        lanes[event.lane].append(event)
    segments = [segment for lane in lanes.values() for segment in own_segments(lane, bounds)]
    for start, end, keys, runs in moments(segments, bounds[0], bounds[-1]):
        if not is_usual(start):
            continue
        if keys:
            busy = [key for key in keys if not is_container(key)] or keys
            for key in busy:
                made.operations[key] += (end - start) / len(busy)
        elif runs[0] == runs[1]:
            made.idle[IDLE] += end - start
        else:
            waited = _overlap(waits, start, end)
            made.idle[INPUT_WAIT] += waited
            made.idle[HOST] += end - start - waited


def boundaries(events: Sequence[Event], n_calls: int) -> list[float]:
    """The start of each call: of the first of the operations that there are exactly once a call.

    Which is the first may differ from call to call: those that do not wait for each other run in any order.

    Raises:
      ProfileError: there is none, so that the trace is not of so many calls.

    Example:
      >>> starts = ((0, "x"), (2, "y"), (4, "z"), (8, "y"), (9, "x"))
      >>> boundaries([Event(0, "a", start, start + 1.0, Key("m", name)) for start, name in starts], 2)
      [0, 8]
    """
    starts: dict[Key, list[float]] = defaultdict(list)
    for event in events:
        if not event.is_task:
            starts[event.key].append(event.start)
    once = [sorted(found) for found in starts.values() if len(found) == n_calls]
    if not once:
        raise ProfileError(
            f"no operation is in the trace once for each of {n_calls} calls: events were lost; trace fewer steps."
        )
    return [min(nth) for nth in zip(*once, strict=True)]


def own_segments(events: Sequence[Event], bounds: Sequence[float]) -> list[Segment]:
    """The stretches of one lane that belong to the innermost event there.

    Args:
      events: of one lane; one may lie inside another. Where one only begins in another, that is over: GPUs let a kernel
        begin before the last one has ended.
      bounds: starts of calls, which number the runs of events that have none.

    Example:
      >>> loop, body = Key("m", "while"), Key("m", "dot")
      >>> events = [Event(0, "a", 0.0, 10.0, loop, 7), Event(0, "a", 2.0, 5.0, body, 7)]
      >>> [(segment.start, segment.end, segment.key.name) for segment in own_segments(events, [0.0])]
      [(0.0, 2.0, 'while'), (2.0, 5.0, 'dot'), (5.0, 10.0, 'while')]
    """
    made: list[Segment] = []
    stack: list[tuple[float, Key, int]] = []
    now = float("-inf")

    def up_to(time: float) -> None:
        nonlocal now
        while stack and now < time:
            end, key, run = stack[-1]
            stop = min(end, time)
            if stop > now:
                made.append(Segment(now, stop, key, run))
                now = stop
            if end <= time:
                stack.pop()
        now = max(now, time)

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        up_to(event.start)
        run = bisect.bisect_right(bounds, event.start) if event.run is None else event.run
        while stack and stack[-1][0] < event.end:
            stack.pop()
        stack.append((event.end, event.key, run))
    up_to(float("inf"))
    return made


def moments(
    segments: Sequence[Segment], first: float, last: float
) -> list[tuple[float, float, list[Key], tuple[int | None, int | None]]]:
    """Cuts the time from `first` to `last` where any lane changes: (start, end, operations at work, runs around).

    The runs are those of the last segment that has begun and of the next one; they matter where nothing is at work.
    """
    changes: list[tuple[float, int, int]] = []
    for i, segment in enumerate(segments):
        start, end = max(segment.start, first), min(segment.end, last)
        if start < end:
            changes += [(start, 1, i), (end, 0, i)]
    changes.sort()
    made: list[tuple[float, float, list[Key], tuple[int | None, int | None]]] = []
    active: dict[int, Key] = {}
    now, run = first, None
    for time, is_start, i in [*changes, (last, 0, -1)]:
        if time > now:
            following = segments[i].run if is_start else None
            made.append((now, time, list(active.values()), (run, following)))
            now = time
        if is_start:
            active[i], run = segments[i].key, segments[i].run
        else:
            active.pop(i, None)
    return made


def _overlap(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """How much of start .. end lies in sorted spans that do not overlap."""
    total = 0.0
    for a, b in spans[max(0, bisect.bisect_left(spans, (start, start)) - 1) :]:
        if a >= end:
            break
        total += max(0.0, min(b, end) - max(a, start))
    return total
