"""The process that traces and compiles: it may take long, or die, and takes nothing else with it.

python -m jaxdl.plan.child REQUEST.json RESULT.json
"""

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdl import choices
from jaxdl.config import leaf_values
from jaxdl.errors import JaxdlError
from jaxdl.plan import roofline, step
from jaxdl.plan.config import resolve
from jaxdl.plan.flops import tracing_for
from jaxdl.plan.topology import devices, parse_topology


def plan(words: Sequence[str], topology_name: str, *, tell: Any = lambda result: None) -> dict[str, Any]:
    """Everything that can be known of a configuration's step beforehand, as JSON values.

    Args:
      words: of the command line: `--config=FILE` and flags.
      topology_name: as for `parse_topology`.
      tell: called with what is known before the step is compiled.

    Raises:
      JaxdlError: what the user gave does not fit, before anything is compiled.
    """
    started = time.perf_counter()
    topology = parse_topology(topology_name)
    with choices.heard() as told, tracing_for(topology.chip.platform):
        parsed, sketch = resolve(words)
        placed = step.place(sketch, devices(topology))
    values = leaf_values(parsed.config)
    result: dict[str, Any] = {
        "file": parsed.file,
        "config": [{"field": k, "value": str(v), "source": parsed.sources[k]} for k, v in values.items()],
        "topology": {
            "name": topology.name,
            "title": topology.chip.title,
            "platform": topology.chip.platform,
            "devices": placed.mesh.size,
            "memory": topology.memory,
        },
        "mesh": dict(placed.mesh.shape),
        "parameters": step.parameter_table(sketch, placed),
        "batch": step.batch_table(placed),
        "rows": sketch.n_rows,
        "steps": sketch.steps,
        "microbatches": sketch.microbatches,
        "notes": list(sketch.notes),
        "held": step.held(sketch, placed),
        "left_whole": step.left_whole(placed),
        "remedies": [{"what": one.what, "flags": list(one.flags)} for one in sketch.remedies],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }
    tell(result)
    with choices.heard() as told_later:
        traced = step.trace(topology, placed)
    result["compiled"] = step.compile_step(topology, placed, traced)
    result["choices"] = list(dict.fromkeys(told + told_later))
    result["flops"] = step.count(sketch, topology, traced)
    held = result["held"]
    least = 2 * (held["parameters"] + held["optimizer"]) + held["batch"]
    result["roofline"] = roofline.bound(topology, result["flops"], least, n_devices=placed.mesh.size)
    result["seconds"] = time.perf_counter() - started
    result["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def main(arguments: Sequence[str]) -> int:
    """Reads a request and writes a result; an error of the user's is a result, too."""
    request, target = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])

    def write(result: dict[str, Any]) -> None:
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(result))
        temporary.replace(target)

    try:
        write(plan(request["words"], request["topology"], tell=write))
    except JaxdlError as error:
        write({"error": str(error), "exit_code": error.exit_code})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
