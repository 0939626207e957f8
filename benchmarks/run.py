"""Runs the benchmarks and prints their report.

    python -m benchmarks.run                      # everything; 25 minutes on two cores
    python -m benchmarks.run mlp --rounds 9       # some of them
    python -m benchmarks.run --rounds 1 --quick   # to see whether they work; the figures mean little

The report goes to standard output as Markdown, what is going on to standard error.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    bert,
    checkpoint,
    generation,
    gpt,
    input_pipeline,
    loop_overhead,
    machine,
    mlp,
    recurrent,
    start_up,
    tiny_loop,
    vision,
)
from benchmarks.harness import BenchmarkError, Settings
from benchmarks.table import Table

WORKLOADS = {
    "mlp": mlp.run,
    "cnn": vision.run_cnn,
    "resnet": vision.run_resnet,
    "recurrent": recurrent.run,
    "gpt": gpt.run,
    "bert": bert.run,
    "generation": generation.run,
    "tiny_loop": tiny_loop.run,
    "loop_overhead": loop_overhead.run,
    "start_up": start_up.run,
    "input_pipeline": input_pipeline.run,
    "checkpoint": checkpoint.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where all workloads asked for were measured."""
    options = _parse(arguments)
    started, facts = time.perf_counter(), machine.describe()
    n_set_ups = machine.n_cores() if "cpu" in facts.get("devices", "cpu") else 1
    settings = Settings(options.rounds, options.quick, note=lambda text: _tell(f"  {text}"), n_set_ups=n_set_ups)
    text, found, failed = [_show(to_markdown(facts, settings))], {}, []
    seconds: dict[str, float] = {}
    for name in options.names or WORKLOADS:
        begun = time.perf_counter()
        _tell(f"{name} ({begun - started:.0f} s so far)")
        try:
            tables = WORKLOADS[name](settings)
        except BenchmarkError as error:
            tables = [Table(name, ["", "not measured"], [["**failed**", str(error)]])]
            failed.append(name)
        seconds[name] = round(time.perf_counter() - begun, 1)
        text += [_show(table.to_markdown()) for table in tables]
        found[name] = [table.to_json() for table in tables]
    text.append(_show(took(seconds)))
    facts["took"] = f"{time.perf_counter() - started:.0f} s"
    if options.markdown:
        options.markdown.write_text("\n".join(text), encoding="utf-8")
    if options.json:
        content = {
            "machine": facts,
            "rounds": settings.rounds,
            "quick": settings.is_quick,
            "seconds": seconds,
            "workloads": found,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _tell(f"took {facts['took']}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Benchmarks of jaxdl.")
    known = ", ".join(WORKLOADS)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {known}; all where none is given")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each competitor (default 7)")
    parser.add_argument("--quick", action="store_true", help="short rounds: to try it out")
    parser.add_argument("--json", type=Path, help="also write every round to this file")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    if unknown := [name for name in options.names if name not in WORKLOADS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {known}")
    return options


def to_markdown(facts: Mapping[str, str], settings: Settings) -> str:
    """The head of the report."""
    lines = ["# Benchmarks", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [
        "",
        f"Medians of {settings.rounds} interleaved rounds (smallest .. largest); ratios are of paired rounds.",
    ]
    if settings.is_quick or settings.rounds < 7:
        lines += ["", "**A short run to try things out: the figures mean little.**"]
    return "\n".join(lines) + "\n"


def took(seconds: Mapping[str, float]) -> str:
    """How long each workload took, the setting up of its competitors included.

    Example:
      >>> took({"mlp": 60.0, "gpt": 90.4})
      'Measuring took 150 s: mlp 60, gpt 90.\\n'
    """
    parts = ", ".join(f"{name} {taken:.0f}" for name, taken in seconds.items())
    return f"Measuring took {sum(seconds.values()):.0f} s: {parts}.\n"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(text: str) -> str:
    print(text, flush=True)
    return text


if __name__ == "__main__":
    sys.exit(main())
