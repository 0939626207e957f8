"""A profile as text that a person reads."""

import statistics

from jaxdl.plan.text import table
from jaxdl.profile.operations import COLLECTIVE, COPY, ELEMENTWISE, OTHER, PRODUCT, REDUCTION
from jaxdl.profile.result import OperationRow, StepProfile, joined, spread
from jaxdl.profile.timeline import HOST, IDLE, INPUT_WAIT
from jaxdl.report.table import format_bytes, format_count

_MEANS = {
    PRODUCT: "matrix products, convolutions, attention and recurrence of a library",
    REDUCTION: "sums, maxima, sorting, and what is fused with them",
    ELEMENTWISE: "one number at a time, fused",
    COLLECTIVE: "messages between devices, and waiting for the others in them",
    COPY: "copies, transposes, slices, gathers, fills, transfers",
    OTHER: "loops themselves, random numbers, calls of libraries",
    HOST: "between programs: Python, dispatch, the start of a program",
    INPUT_WAIT: "between programs, while Python waits for a batch",
    IDLE: "within a program, no operation runs",
}
_PARTS = {"forward": "forward", "backward": "backward", "again": "forward again (remat)", "rest": "update and the rest"}
_WIDEST = 56


def page(profile: StepProfile) -> str:
    """All of a profile but for the operations that are not among the longest."""
    return "\n\n".join([_heading(profile), _kinds(profile), _operations(profile), _trace(profile)])


def _heading(profile: StepProfile) -> str:
    median, least, most = (_ms(seconds) for seconds in spread(profile.step_s))
    plain = profile.plain_s
    parts = [f"{profile.n_devices} x {profile.device}", f"{profile.steps} steps", f"{_ms(plain)} ms a step"]
    if profile.rows:
        parts.append(f"{profile.rows / plain:,.0f} rows/s")
    if profile.tokens:
        parts.append(f"{profile.tokens / plain:,.0f} tokens/s")
    flops = sum(profile.flops.values())
    rates = f"{format_count(flops)} FLOPs a step, {profile.flops_rate / 1e9:,.1f} GFLOP/s"
    parts += [rates, f"{100 * profile.share_of_peak:.1f} % of the peak"]
    peaks = profile.peaks
    rate = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in peaks.flops.items())
    return (
        f"{', '.join(parts)}\n"
        f"with the trace on: {median} ms a step ({least} .. {most}), median (smallest .. largest)\n"
        f"peak of a device: {rate}, {peaks.bandwidth / 1e9:,.1f} GB/s ({peaks.source})"
    )


def _kinds(profile: StepProfile) -> str:
    total = profile.traced_s
    lines = [["where the time of a step is", "ms", "share", ""]]
    for kind, seconds in profile.kinds.items():
        lines.append([kind, _ms(seconds), _percent(seconds, total), _MEANS[kind]])
    lines.append(["sum: a usual step in the trace", _ms(total), _percent(total, total), ""])
    lines.append(["mean of all steps in the trace", _ms(statistics.fmean(profile.step_s)), "", ""])
    parts = [f"{name} {_percent(profile.parts[part], total)}" for part, name in _PARTS.items() if part in profile.parts]
    return f"{table(lines, right=[1, 2])}\nof which {', '.join(parts)}"


def _operations(profile: StepProfile) -> str:
    rows = joined(profile.operations, profile.peaks)
    shown = rows[: profile.top]
    heading = ["largest operations", "part", "kind", "calls", "ms", "share", "FLOPs", "bytes", "GFLOP/s", "GB/s"]
    lines = [[*heading, "limited by"], *(_line(row) for row in shown)]
    rest = sum(row.share for row in rows[profile.top :])
    more = f"\n{len(rows) - len(shown)} more take {100 * rest:.1f} %" if len(rows) > len(shown) else ""
    told = "\ncalls and ms a step, FLOPs and bytes a call; * stands for the numbers of layers alike"
    return table(lines, right=[3, 4, 5, 6, 7, 8, 9]) + more + told


def _line(row: OperationRow) -> list[str]:
    seconds = row.seconds / row.calls if row.calls else 0.0
    rate = "?" if row.flops is None else f"{row.flops / seconds / 1e9:,.0f}" if row.flops and seconds else ""
    return [
        shortened(row.path),
        row.part,
        row.kind,
        f"{row.calls:,.0f}",
        _ms(row.seconds),
        f"{100 * row.share:.1f} %",
        "?" if row.flops is None else format_count(row.flops) if row.flops else "",
        format_bytes(row.n_bytes) if row.n_bytes else "",
        rate,
        f"{row.n_bytes / seconds / 1e9:,.1f}" if row.n_bytes and seconds else "",
        row.limited_by,
    ]


def shortened(path: str, widest: int = _WIDEST) -> str:
    """A long path without modules in its middle.

    Example:
      >>> shortened("encoder/block_3/attention/query/dot_general", 34)
      'encoder/.../query/dot_general'
    """
    made_for, _, place = path.rpartition(" for ")
    first = f"{made_for} for " if made_for else ""
    parts = place.split("/")
    while len(first + "/".join(parts)) > widest and len([part for part in parts if part != "..."]) > 2:
        parts = [parts[0], "...", *[part for part in parts[1:-1] if part != "..."][1:], parts[-1]]
    text = first + "/".join(parts)
    return text if len(text) <= widest else f"{text[: widest - 3]}..."


def _trace(profile: StepProfile) -> str:
    if profile.trace is None:
        return "the trace was not kept; give a folder to keep it"
    return (
        f"trace         {profile.trace}\n"
        "              open its *.trace.json.gz at ui.perfetto.dev, or show the folder with XProf:\n"
        f"              pip install xprof && xprof --logdir {profile.trace}"
    )


def _ms(seconds: float) -> str:
    """Milliseconds with three digits or more."""
    ms = 1000 * seconds
    return f"{ms:,.1f}" if ms >= 10 else f"{ms:.3f}"


def _percent(part: float, total: float) -> str:
    return f"{100 * part / total:.1f} %" if total else ""
