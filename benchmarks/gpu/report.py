"""The tables of `benchmarks.gpu.run`: what was measured, and beside it what `jaxdl plan` says of the same step."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.sides import peak_flops
from benchmarks.gpu.workloads import Workload, verdicts
from benchmarks.harness import BenchmarkError, Result, check_same_losses, fastest, speed_up, spread
from benchmarks.table import Table, not_run, ratio_cell, time_cell

PREDICTIONS = Path(__file__).parent / "predictions.json"
GIB = 2**30


def predictions() -> Mapping[str, Any]:
    """What `benchmarks.gpu.predict` wrote: workload -> competitor -> figures; empty where it has not run."""
    return json.loads(PREDICTIONS.read_text())["workloads"] if PREDICTIONS.exists() else {}


def to_table(
    name: str, workload: Workload, results: Sequence[Result], ceilings: Mapping[str, Any], is_tiny: bool
) -> Table:
    """The table of a workload.

    Args:
      name, workload: which.
      results: of `rounds.measure`.
      ceilings: of `ceilings.Ceilings`.
      is_tiny: the sizes are small, of which no plan was made.
    """
    sizes = workload.sizes_of(is_tiny)
    theirs = [result for result in results if result.name.startswith("PyTorch")] or list(results[:1])
    best, planned = fastest(theirs), {} if is_tiny else predictions().get(name, {})
    flops = next((r.facts["model_flops"] for r in results if "model_flops" in r.facts), None)
    columns = ["", f"{workload.unit}/s", "time of a step", f"speed against {best.name}", "MFU", "peak GiB"]
    columns += ["plan: peak GiB", "plan: at least", "compiled in"]
    table = Table(workload.title.format(**sizes), columns, results=list(results))
    for result in results:
        plan = _plan_cells(planned.get(result.name), sizes)
        if result.failure:
            table.rows.append([*not_run(result.name, result.failure, 6), *plan, "-"])
            continue
        rate = spread([workload.units(sizes) / s for s in result.seconds])
        cells = [f"{rate.median:,.0f}", time_cell(spread(result.seconds)), ratio_cell(speed_up(result, best))]
        cells += [_mfu(result, flops, ceilings), _gib(result.facts.get("peak_bytes"))]
        table.rows.append([result.name, *cells, *plan, f"{result.facts['warm_up_s']:.0f} s"])
    if workload.tolerance is not None:
        table.notes.append(other_maths(results, workload.tolerance) or _agreement(results, workload.tolerance))
    table.notes += ["PyTorch is not compiled at this size."] if is_tiny else verdicts(workload, results)
    if network := next((r.facts["network"] for r in results if "network" in r.facts), None):
        table.notes.append(f"PyTorch's network: {network}.")
    if choices := next((r.facts["choices"] for r in results if "choices" in r.facts), None):
        table.notes.append(f"jaxdl chose: {'; '.join(choices)}.")
    return table


def other_maths(results: Sequence[Result], tolerance: float | None) -> str | None:
    """None, or that the competitors compute different losses: the figures are shown, and compare different work."""
    try:
        check_same_losses([] if tolerance is None else results, tolerance or 0.0)
    except BenchmarkError as error:
        return f"**Not the same work:** {error}"
    return None


def _agreement(results: Sequence[Result], tolerance: float) -> str:
    if sum(not result.failure for result in results) < 2:
        return "First losses: nothing to compare."
    return f"First losses agree to {check_same_losses(results, tolerance):.0e} (allowed {tolerance:.0e})."


def _mfu(result: Result, flops: float | None, ceilings: Mapping[str, Any]) -> str:
    """Of all competitors by the same operations, those of the mathematics; LoRA has fewer than full fine-tuning."""
    flops = result.facts.get("model_flops", flops)
    peak = peak_flops(ceilings.get("kind", ""))
    return "-" if flops is None or math.isnan(peak) else f"{100 * flops / result.median_s / peak:.1f} %"


def _plan_cells(planned: Mapping[str, Any] | None, sizes: Mapping[str, Any]) -> list[str]:
    if not planned or planned["sizes"] != dict(sizes):
        return ["-", "-"]
    return [_gib(planned["peak_bytes"]), f"{1e3 * planned['bound_s']:.1f} ms"]


def _gib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / GIB:.2f}"


def ceilings_note(found: Mapping[str, Any]) -> str:
    """One line of what the device reaches at the most.

    Example:
      >>> ceilings_note({"kind": "H100", "product_flops": 798e12, "copy_bytes": 3e12})
      'H100: bfloat16 product of 8192 x 8192: 798 TFLOP/s; copy: 3.00 TB/s'
    """
    if "failure" in found:
        return f"not measured ({found['failure']})"
    rates = f"{found['product_flops'] / 1e12:.0f} TFLOP/s; copy: {found['copy_bytes'] / 1e12:.2f} TB/s"
    return f"{found['kind']}: bfloat16 product of 8192 x 8192: {rates}"


def head(facts: Mapping[str, str], is_tiny: bool) -> str:
    """The top of the report."""
    lines = ["# Benchmarks on a GPU", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines.append(f"Medians of interleaved rounds (smallest .. largest); ratios are of paired rounds. {CONVENTIONS}")
    if is_tiny:
        lines += ["", "**Tiny sizes, to see that everything works: the figures mean nothing.**"]
    return "\n".join(lines) + "\n"


CONVENTIONS = (
    "MFU is the operations that the mathematics of a step needs, attention as if nothing were masked and nothing "
    "computed twice, over the maker's peak in bfloat16. Peak memory is the most bytes in use that each library's own "
    "allocator counted. The plan's peak and least time were told without a GPU (`python -m benchmarks.gpu.predict`)."
)
