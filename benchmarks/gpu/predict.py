"""Compiles jaxdl's side of the GPU benchmarks for an H100 without one, and keeps what the plan says of each.

    python -m benchmarks.gpu.predict             # about five minutes on two cores; writes predictions.json beside it
    python -m benchmarks.gpu.predict gpt --hlo /tmp/gpt.txt

It needs the CUDA plug-in of JAX's own version and cuDNN, and neither a GPU nor a driver: `pip install
'jaxdl[plan-gpu]'` in an environment of its own. Memory and time are those of `jaxdl plan`; what the compiled program
calls, and in which precision it multiplies, is read from its text. cuDNN's LSTM cannot be traced without a GPU: its
row is of the scan.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu.report import GIB, PREDICTIONS
from benchmarks.gpu.workloads import WORKLOADS
from benchmarks.table import Table


def predict(target: str, options: Mapping[str, Any], topology_name: str, hlo: Path | None = None) -> dict[str, Any]:
    """What `jaxdl plan` says of the step of one competitor.

    Args:
      target: of `Competitor`, a subclass of `sides.Jaxdl`.
      options: its keywords.
      topology_name: as for `parse_topology`; `cpu:1` compiles for this machine.
      hlo: where to write the compiled program's text.

    Returns:
      `peak_bytes`, `bound_s`, `model_flops`, `products` (operations by dtype), `traffic_bytes`, `calls` (of custom
      calls, by target), `seconds` of compiling, and `choices`.
    """
    from jaxdl import choices
    from jaxdl.plan import parse_topology, roofline, step
    from jaxdl.plan.flops import tracing_for
    from jaxdl.plan.topology import devices

    topology = parse_topology(topology_name)
    with choices.heard() as told:
        with tracing_for(topology.chip.platform):
            sketch, placed = _place(target, options, devices(topology))
        traced = step.trace(topology, placed)
        with _text_kept() as texts:
            compiled = step.compile_step(topology, placed, traced)
    if hlo:
        hlo.write_text(texts[-1])
    held, counted = step.held(sketch, placed), step.count(sketch, topology, traced)
    least = 2 * (held["parameters"] + held["optimizer"]) + held["batch"]
    bound = roofline.bound(topology, counted, least)
    return {
        "peak_bytes": compiled["peak"],
        "state_bytes": compiled["arguments"],
        "aliased_bytes": compiled["aliased"],
        "bound_s": bound["step_s"] if bound else None,
        "model_flops": counted["model"],
        "products": counted["program"],
        "traffic_bytes": compiled["traffic"],
        "traffic_s": compiled["traffic"] / topology.chip.bandwidth if topology.chip.bandwidth else None,
        "calls": dict(calls(texts[-1])),
        "seconds": round(compiled["seconds"], 1),
        "choices": list(dict.fromkeys(told)),
    }


def _place(target: str, options: Mapping[str, Any], found: list[Any]) -> tuple[Any, Any]:
    from benchmarks.gpu.sides import batch_shapes, make_step
    from benchmarks.training import make_adamw
    from jaxdl.plan import Sketch, step

    module, _, name = target.partition(":")
    parts = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(**options).parts
    sketch = Sketch(parts.init, parts.loss_fn, make_adamw(), batch_shapes(parts), trainable=parts.trainable)
    return sketch, dataclasses.replace(step.place(sketch, found), step=make_step(parts))


@contextlib.contextmanager
def _text_kept() -> Iterator[list[str]]:
    """The texts that the plan reads meanwhile."""
    from jaxdl.plan import program

    texts, parse = [], program.parse

    def keep(text: str) -> Any:
        texts.append(text)
        return parse(text)

    with mock.patch.object(program, "parse", keep):
        yield texts


def calls(text: str) -> Counter[str]:
    """How often a compiled program calls what is not XLA's own, by target.

    Example:
      >>> calls('''ENTRY %main (x: f32[2]) -> f32[2] {
      ...   %x = f32[2]{0} parameter(0)
      ...   ROOT %y = f32[2]{0} custom-call(%x), custom_call_target="__cublas$gemm"
      ... }''')
      Counter({'__cublas$gemm': 1})
    """
    import re

    from jaxdl.plan.program import parse, walk

    found: Counter[str] = Counter()
    for _, one, times in walk(parse(text)):
        if one.opcode == "custom-call" and (target := re.search(r'custom_call_target="([^"]*)"', one.attributes)):
            found[target[1]] += times
    return found


def to_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each step."""
    columns = ["", "plan: peak GiB", "plan: at least", "at the maker's rates, traffic", "products", "calls"]
    table = Table("What the plan says of the GPU benchmarks on an H100", columns)
    for name, competitors in found.items():
        for competitor, told in competitors.items():
            rows = [f"{told['peak_bytes'] / GIB:.2f}"]
            rows += ["-" if told[key] is None else f"{1e3 * told[key]:.1f} ms" for key in ("bound_s", "traffic_s")]
            products = ", ".join(f"{n / 1e12:.2f} T {dtype}" for dtype, n in sorted(told["products"].items()))
            called = ", ".join(f"{n} x `{target}`" for target, n in sorted(told["calls"].items()))
            table.rows.append([f"{name}: {competitor}", *rows, products, called or "none"])
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where all was compiled, 2 where something must be installed first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.predict", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {', '.join(WORKLOADS)}")
    parser.add_argument("--hlo", type=Path, help="also write the text of the last program to this file")
    options = parser.parse_args(arguments)
    import jax

    from jaxdl.plan.topology import missing, parse_topology

    topology = parse_topology("h100:1")
    if told := missing(topology):
        print(f"predict: {told}", file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    kept = json.loads(PREDICTIONS.read_text())["workloads"] if PREDICTIONS.exists() else {}
    for name in options.names or WORKLOADS:
        workload, kept[name] = WORKLOADS[name], {}
        for competitor, (target, own) in workload.rows.items():
            if not target.partition(":")[2].startswith("Jaxdl"):
                continue
            print(f"{name}: {competitor}", file=sys.stderr, flush=True)
            figures = predict(target, {**workload.sizes, **own}, topology.name, options.hlo)
            kept[name][competitor] = {"sizes": dict(workload.sizes), "options": dict(own), **figures}
            versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")}
            content = {"topology": topology.name, "versions": versions, "workloads": kept}
            PREDICTIONS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(to_table(kept).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
