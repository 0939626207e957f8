"""The tables of a profile: where the time of a step went, by kind and by operation."""

import dataclasses
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxdl.profile.names import without_numbers
from jaxdl.profile.operations import COLLECTIVE, COPY, ELEMENTWISE, KINDS, OTHER, Operation
from jaxdl.profile.peaks import Peaks, limited_by
from jaxdl.profile.timeline import Shares
from jaxdl.profile.trace import Key

OF_LOOP, OF_COLLECTIVE = "starting what it runs", "messages, waiting"


@dataclass(frozen=True)
class OperationRow:
    """An operation of a step, or several alike.

    Attributes:
      name: XLA's; of several, how many there are.
      path, part, kind: see `Operation`.
      calls: a step, on one device.
      seconds: a step, on one device: its own time, without that of operations inside or of others at the same moment.
      share: of the step.
      flops: of a call; None where they are not known.
      dtype: of the operands of its products.
      n_bytes: of a call.
      limited_by: see `peaks.limited_by`; a loop itself takes time only where nothing inside of it runs.
    """

    name: str
    path: str
    part: str
    kind: str
    calls: float
    seconds: float
    share: float
    flops: float | None
    dtype: str
    n_bytes: float
    limited_by: str


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step went; `str` of it is a page of tables.

    Attributes:
      device: what it ran on.
      n_devices: that took part.
      steps: in the trace.
      step_s: seconds of each call over the steps of a call, with the trace on.
      plain_s: seconds of a step without the trace, the mean of as many.
      flops: of a step on all devices, by dtype.
      rows, tokens: of a batch; None where they are not known.
      peaks: of one device.
      kinds: seconds a step by kind of operation, then `host`, `input wait` and `idle`; they sum to the mean
        of the usual steps, see `timeline.usual_calls`.
      parts: seconds of operations by part of the step.
      operations: every operation, the longest first.
      trace: the folder of the trace; None where it was not kept.
      top: how many rows of operations `str` shows.
    """

    device: str
    n_devices: int
    steps: int
    step_s: Sequence[float]
    plain_s: float
    flops: Mapping[str, float]
    rows: int | None
    tokens: int | None
    peaks: Peaks
    kinds: Mapping[str, float]
    parts: Mapping[str, float]
    operations: Sequence[OperationRow]
    trace: str | None = None
    top: int = 15

    @property
    def traced_s(self) -> float:
        """Seconds of a usual step in the trace: the sum of `kinds`."""
        return sum(self.kinds.values())

    @property
    def flops_rate(self) -> float:
        """Operations a second of all devices, without the trace."""
        return sum(self.flops.values()) / self.plain_s

    @property
    def share_of_peak(self) -> float:
        """The least time of the products at the devices' peak, over the time of a step without the trace."""
        return self.peaks.seconds(self.flops) / self.n_devices / self.plain_s

    def to_json(self) -> str:
        """All of it; times in seconds, operations not joined."""
        more = {"traced_s": self.traced_s, "flops_rate": self.flops_rate, "share_of_peak": self.share_of_peak}
        return json.dumps({**dataclasses.asdict(self), **more}, indent=1)

    def __str__(self) -> str:
        from jaxdl.profile.text import page

        return page(self)


def tables(
    shares: Shares, programs: Mapping[str, Mapping[str, Operation]], steps: float, peaks: Peaks
) -> tuple[dict[str, float], dict[str, float], list[OperationRow]]:
    """Seconds a step by kind and by part, and a row for each operation.

    Args:
      shares: of the trace.
      programs: name of a program -> its operations.
      steps: that the calls of `shares` made.
      peaks: of one device.
    """
    kinds, parts = dict.fromkeys(KINDS, 0.0), Counter[str]()
    total, rows = shares.total / steps / 1e9, []
    for key, time in shares.operations.items():
        one, seconds = find(programs, key), time / steps / 1e9
        kinds[one.kind] += seconds
        parts[one.part] += seconds  # type: ignore[assignment]
        rows.append(_row([(one, shares.counts.get(key, 0.0) / steps, seconds)], total, peaks))
    kinds.update({name: time / steps / 1e9 for name, time in shares.idle.items()})
    return kinds, dict(parts), sorted(rows, key=lambda row: -row.seconds)


def find(programs: Mapping[str, Mapping[str, Operation]], key: Key) -> Operation:
    """The operation behind an event: of its program, else of any that has one of that name, else what the name says."""
    own = programs.get(key.module, {})
    found = own.get(key.name) or next((ops[key.name] for ops in programs.values() if key.name in ops), None)
    if found is not None and (key.module in programs or not key.module):
        return found
    is_copy = key.name.lower().startswith(("memcpy", "memset", "copy", "transpose"))
    kind = COPY if is_copy else OTHER if key.module == "" else ELEMENTWISE if "fusion" in key.name else OTHER
    where = f"{key.module}: " if key.module else ""
    return Operation(key.name, kind, f"{where}{key.name}", "rest", flops=None)


def _row(found: Sequence[tuple[Operation, float, float]], total: float, peaks: Peaks) -> OperationRow:
    """One row of operations alike: (operation, calls, seconds) each."""
    one, calls = found[0][0], sum(calls for _, calls, _ in found)
    seconds, n = sum(seconds for _, _, seconds in found), max(calls, 1e-9)
    flops = None if any(o.flops is None for o, _, _ in found) else sum((o.flops or 0) * c for o, c, _ in found) / n
    n_bytes = sum(o.n_bytes * c for o, c, _ in found) / n
    name = one.name if len(found) == 1 else f"{len(found)} operations"
    fixed = OF_LOOP if one.is_container else OF_COLLECTIVE if one.kind == COLLECTIVE else ""
    limit = fixed or limited_by(seconds / n, flops, n_bytes, one.dtype, peaks)
    share = seconds / total if total else 0.0
    return OperationRow(name, one.path, one.part, one.kind, calls, seconds, share, flops, one.dtype, n_bytes, limit)


def joined(rows: Iterable[OperationRow], peaks: Peaks) -> list[OperationRow]:
    """Rows that differ only in the number of their layer, as one; the longest first."""
    groups: dict[tuple[str, ...], list[OperationRow]] = defaultdict(list)
    for row in rows:
        groups[without_numbers(row.path), row.part, row.kind, row.dtype].append(row)
    return sorted((_join(path, group, peaks) for (path, *_), group in groups.items()), key=lambda row: -row.seconds)


def _join(path: str, rows: Sequence[OperationRow], peaks: Peaks) -> OperationRow:
    if len(rows) == 1:
        return rows[0]
    calls, seconds = sum(row.calls for row in rows), sum(row.seconds for row in rows)
    n = max(calls, 1e-9)
    flops = None if any(row.flops is None for row in rows) else sum((row.flops or 0) * row.calls for row in rows) / n
    n_bytes = sum(row.n_bytes * row.calls for row in rows) / n
    fixed = rows[0].limited_by if rows[0].limited_by in (OF_LOOP, OF_COLLECTIVE) else ""
    return dataclasses.replace(
        rows[0],
        name=f"{len(rows)} operations",
        path=path if len({row.path for row in rows}) > 1 else rows[0].path,
        calls=calls,
        seconds=seconds,
        share=sum(row.share for row in rows),
        flops=flops,
        n_bytes=n_bytes,
        limited_by=fixed or limited_by(seconds / n, flops, n_bytes, rows[0].dtype, peaks),
    )


def counted(rows: Iterable[OperationRow], n_devices: int) -> dict[str, float]:
    """FLOPs of a step on all devices by dtype, as the operations in the trace have them."""
    total: dict[str, float] = defaultdict(float)
    for row in rows:
        if row.flops:
            total[row.dtype] += row.flops * row.calls * n_devices
    return dict(total)


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return statistics.median(seconds), min(seconds), max(seconds)
