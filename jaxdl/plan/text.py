"""A plan as text that a person reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdl.report.table import format_bytes, format_count, format_duration, parameter_table

Result = Mapping[str, Any]


def peak(result: Result) -> int:
    """Bytes that one device needs at the most; where the compiler found no room, what it says that it needs."""
    compiled = result["compiled"]
    return int(compiled["needed"] if "refused" in compiled else compiled["peak"])


def fits(result: Result) -> bool:
    """Whether the step compiled, and its peak is within a device's memory."""
    return "refused" not in result["compiled"] and peak(result) <= result["topology"]["memory"]


def groups(result: Result) -> dict[str, int]:
    """Bytes on one device by group: what the arguments take as their shapes say, and the rest of the compiler's peak.

    Padding is what the compiler's arguments take beyond their shapes. Gradients are counted once and whole, as far as
    the temporaries of the program have room for them.

    Example:
      >>> held = {"parameters": 8, "optimizer": 16, "other state": 0, "batch": 4, "gradients": 8}
      >>> groups({"held": held, "compiled": {"arguments": 28, "peak": 50}})["activations and temporaries"]
      14
    """
    held, compiled = result["held"], result["compiled"]
    rest = max(0, compiled["peak"] - compiled["arguments"])
    gradients = min(held["gradients"], rest)
    known = {name: held[name] for name in ("parameters", "optimizer", "other state", "batch")}
    padding = max(0, compiled["arguments"] - sum(known.values()))
    return {**known, "padding": padding, "gradients": gradients, "activations and temporaries": rest - gradients}


def page(result: Result, *, max_rows: int | None = 40) -> str:
    """All of a plan."""
    parts = [
        _heading(result),
        _config(result["config"]),
        _parameters(result, max_rows),
        _batch(result),
        _memory(result),
        _work(result),
        _verdict(result),
    ]
    return "\n\n".join(part for part in parts if part)


def _heading(result: Result) -> str:
    topology, mesh = result["topology"], ", ".join(f"{name}={n}" for name, n in result["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"Plan of {result['file']} on {topology['name']}: {topology['devices']} x {topology['title']}, mesh {mesh}\n"
        f"({versions})"
    )


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns; the first row is the heading.

    Example:
      >>> print(table([["group", "bytes"], ["batch", "4"]], right=[1]))
      group  bytes
      ------------
      batch      4
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _config(rows: Sequence[Mapping[str, str]]) -> str:
    """What somebody chose; the fields that are as the experiment has them are counted."""
    chosen = [row for row in rows if row["source"] != "default"]
    lines = [["field", "value", "from"], *([row["field"], row["value"], row["source"]] for row in chosen)]
    n = len(rows) - len(chosen)
    told = f"{n} further fields have the experiment's defaults; --json FILE lists them"
    return f"{table(lines)}\n{told}" if chosen else told


def _parameters(result: Result, max_rows: int | None) -> str:
    rows = [{**row, "shape": tuple(row["shape"])} for row in result["parameters"]]
    order = ("path", "shape", "dtype", "trainable", "decay", "lr_scale", "sharding", "source")
    return parameter_table([{name: row[name] for name in order} for row in rows], max_rows=max_rows)


def _batch(result: Result) -> str:
    lines = [["batch", "shape", "dtype", "sharding"]]
    for row in result["batch"]:
        lines.append([row["name"], str(tuple(row["shape"])), row["dtype"], row["sharding"]])
    told = [f"{result['microbatches']} microbatches"] if result["microbatches"] > 1 else []
    told.append(f"{result['rows']:,} training rows" if result["rows"] else "the number of training rows is not known")
    if result["steps"]:
        told.append(f"{result['steps']:,} steps")
    return "\n".join([table(lines), ", ".join(told), *result["notes"]])


def _memory(result: Result) -> str:
    compiled, held = result["compiled"], result["held"]
    if "refused" in compiled:
        lines = [["memory of one device", ""], *([name, format_bytes(n)] for name, n in held.items())]
        return f"{table(lines, right=[1])}\nthe compiler: {compiled['refused']}"
    found = groups(result)
    total, most = sum(found.values()), max(compiled["peak"], 1)
    lines = [["memory of one device", "", "share"]]
    lines += [[name, format_bytes(n), f"{100 * n / most:.1f} %"] for name, n in found.items()]
    lines.append(["sum of the groups", format_bytes(total), f"{100 * total / most:.1f} %"])
    lines.append(["the compiler's peak", format_bytes(compiled["peak"]), ""])
    if compiled["host"]:
        lines.append(["on the host beside it", format_bytes(compiled["host"]), ""])
    whole = result["left_whole"]
    more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
    told = f"\nwhole on every device, 1 MiB or more each: {', '.join(whole[:3])}{more}" if whole else ""
    return table(lines, right=[1, 2]) + told


def _work(result: Result) -> str:
    counted, n = result["flops"], result["topology"]["devices"]
    done = sum(counted["program"].values())
    dtypes = ", ".join(f"{format_count(count)} in {dtype}" for dtype, count in counted["program"].items())
    lines = [
        f"operations of a step: the model {format_count(counted['model'])}, this program {format_count(done)} "
        f"({dtypes}), a device {format_count(done / n)}"
    ]
    compiled = result["compiled"]
    if "traffic" in compiled:
        lines.append(f"traffic with a device's memory: {format_bytes(compiled['traffic'])} if every fusion goes there")
        lines.append(_collectives(compiled["collectives"]))
    if result["choices"]:
        lines.append("chosen: " + "; ".join(result["choices"]))
    return "\n".join([*lines, _roofline(result)])


def _collectives(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "devices send each other nothing"
    lines = [["devices send each other", "over", "times a step", "bytes a device", "largest"]]
    for row in rows:
        sizes = [f"{row['count']:,}", format_bytes(row["bytes"]), format_bytes(row["largest"])]
        lines.append([row["kind"], ", ".join(row["axes"]) or "-", *sizes])
    return table(lines, right=[2, 3, 4])


def _roofline(result: Result) -> str:
    bound = result["roofline"]
    if bound is None:
        return "no bound of the time of a step: the rates of this device are not known"
    return (
        f"a step takes at least {_short(bound['step_s'])} (products {_short(bound['compute_s'])}, "
        f"memory {_short(bound['memory_s'])}), which would be {100 * bound['mfu']:.0f} % MFU; no prediction:\n"
        + "\n".join(f"  - {one}" for one in bound["assumptions"])
    )


def _short(seconds: float) -> str:
    """Of a step, which may be far below a millisecond."""
    return format_duration(seconds) if seconds >= 0.01 else f"{1000 * seconds:.3g} ms"


def _verdict(result: Result) -> str:
    memory, need = result["topology"]["memory"], peak(result)
    of = {
        "cpu": "this machine's memory over the devices",
        "gpu": "what JAX takes of a GPU, see XLA_PYTHON_CLIENT_MEM_FRACTION",
        "tpu": "what a program may use",
    }[result["topology"]["platform"]]
    spent = f"compiled in {format_duration(result['compiled']['seconds'])}, all in {format_duration(result['seconds'])}"
    end = f"\n({spent}, {format_bytes(result['rss'])} of this machine's memory)"
    if fits(result):
        return f"It fits: {format_bytes(need)} of {format_bytes(memory)} ({of}), {100 * need / memory:.0f} %.{end}"
    needs = f"{format_bytes(need)} are needed" if need else "there is no room"
    return f"It does not fit: {needs} and {format_bytes(memory)} are there ({of}).{end}"


def remedies(result: Result) -> str:
    """What was tried, the one that needs least first."""
    tried = result["tried"]
    if not tried:
        return "No remedy was tried."
    before = peak(result)
    lines = [["remedy", "peak", "saves", "fits", "flags"]]
    for one in sorted(tried, key=lambda one: one["peak"] or float("inf")):
        saved = before - one["peak"]
        lines.append(
            [
                one["what"],
                format_bytes(one["peak"]) if one["peak"] else "unknown",
                format_bytes(saved) if one["peak"] and before else "",
                "yes" if one["fits"] else "no",
                " ".join(one["flags"]),
            ]
        )
    found = next((one for one in tried if one["fits"]), None)
    verdict = "None of these is enough." if found is None else f"It fits with {' '.join(found['flags'])}"
    return f"{table(lines, right=[1, 2])}\n{verdict}"
