"""Runs the benchmarks for one GPU and prints their report.

    python -m benchmarks.gpu.run                 # everything that ten minutes hold, the most telling first
    python -m benchmarks.gpu.run gpt lora        # some of them
    python -m benchmarks.gpu.run --tiny          # small enough for a CPU, to see that they work; figures mean nothing

The report goes to standard output as Markdown, what is going on to standard error. Files are written after each
workload, so that a run that is cut off has shown what it has.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu import rounds
from benchmarks.gpu.report import ceilings_note, head, other_maths, to_table
from benchmarks.gpu.workloads import WORKLOADS
from benchmarks.harness import BenchmarkError, Child, Competitor, Result
from benchmarks.table import Table

RESERVE_S = 10  # for ending processes and writing


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where nothing failed; what did not fit into the time is no failure, and said in its row."""
    options = _parse(arguments)
    started = time.monotonic()
    deadline = started + options.seconds - RESERVE_S
    facts = {**machine.describe(), "ceilings": "not measured"}
    ceilings = {} if options.tiny else _ceilings(facts)
    pages, found, is_bad = [head(facts, options.tiny)], {}, False
    print(pages[0], flush=True)
    for name in options.names or WORKLOADS:
        _tell(f"{name} ({time.monotonic() - started:.0f} s so far)")
        table, failed = _measured(name, deadline, options, ceilings)
        is_bad |= failed
        pages.append(table.to_markdown())
        found[name] = table.to_json()
        print(pages[-1], flush=True)
        facts["took"] = f"{time.monotonic() - started:.0f} s of {options.seconds}"
        _write(options, "\n".join(pages), {"machine": facts, "tiny": options.tiny, "workloads": found})
    _tell(f"took {time.monotonic() - started:.0f} s")
    return 1 if is_bad else 0


def _measured(name: str, deadline: float, options: Any, ceilings: Mapping[str, Any]) -> tuple[Table, bool]:
    workload = WORKLOADS[name]
    competitors = workload.competitors(options.tiny)
    left = deadline - time.monotonic()
    if left < (0 if options.tiny else workload.seconds):
        late = f"{rounds.OUT_OF_TIME}: it takes about {workload.seconds} s and {max(0, left):.0f} s were left"
        results = [Result(competitor.name, failure=late) for competitor in competitors]
    else:
        note = lambda text: _tell(f"  {text}")  # noqa: E731
        results = rounds.measure(competitors, deadline, note, 1 if options.tiny else rounds.MOST_ROUNDS)
    failed = any(result.failure and not result.failure.startswith(rounds.OUT_OF_TIME) for result in results)
    failed |= other_maths(results, workload.tolerance) is not None
    return to_table(name, workload, results, ceilings, options.tiny), failed


def _ceilings(facts: dict[str, str]) -> Mapping[str, Any]:
    with Child(Competitor("ceilings", "benchmarks.gpu.ceilings:Ceilings")) as child:
        try:
            child.set_up()
            found = child.facts()
        except BenchmarkError as error:
            found = {"failure": str(error)}
    facts["ceilings"] = ceilings_note(found)
    return found


def _write(options: Any, text: str, content: Mapping[str, Any]) -> None:
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description="Benchmarks of jaxdl on a GPU.")
    known = ", ".join(WORKLOADS)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {known}; all where none is given")
    parser.add_argument("--seconds", type=int, default=540, help="time for all of it (default 540)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, one round, also without a GPU")
    parser.add_argument("--json", type=Path, help="also write every round to this file")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file")
    options = parser.parse_args(arguments)
    if options.seconds < 60:
        parser.error(f"--seconds {options.seconds} must be at least 60")
    if unknown := [name for name in options.names if name not in WORKLOADS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {known}")
    return options


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
