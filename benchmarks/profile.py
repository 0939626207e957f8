"""Where the time of a workload's step goes, in jaxdl's best form as the benchmarks run it.

    python -m benchmarks.profile gpt              # a device a core, freed memory kept
    python -m benchmarks.profile gpt --one        # one device, as the row "jaxdl" is
    python -m benchmarks.profile lstm --top 30 --folder runs/profile/lstm

What waits for a batch moves it to the device, as in the benchmarks.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import bert, gpt, mlp, recurrent, vision
from benchmarks.machine import n_cores
from benchmarks.training import MEMORY_KEPT
from jaxdl.errors import JaxdlError
from jaxdl.profile import StepProfile, profile_step


class Workload(NamedTuple):
    """A class with `call`, `state`, `batch`, `sharding` and `n`, its sizes, and the options of its best form."""

    side: Any
    sizes: Mapping[str, Any]
    best: Mapping[str, Any]


def _spread(**more: Any) -> dict[str, Any]:
    return {"n_devices": n_cores(), **more}


WORKLOADS: dict[str, Workload] = {
    "mlp": Workload(mlp.Jaxdl, {"mode": "steps", "sizes": mlp.SIZES, "batch_size": mlp.BATCH_SIZE}, {"mode": "repeat"}),
    "cnn": Workload(vision.JaxdlCNN, vision.CNN, _spread(is_mapped=True)),
    "resnet": Workload(vision.JaxdlResNet, vision.RESNET, _spread(is_mapped=True)),
    "gpt": Workload(gpt.Jaxdl, gpt.SIZES, _spread(is_mapped=True)),
    **{
        name.lower().split()[0]: Workload(recurrent.Jaxdl, {**options, **recurrent.SIZES}, _spread(is_mapped=True))
        for name, (options, _, _) in recurrent.WORKLOADS.items()
    },
    **{
        f"bert-{kind}": Workload(bert.Jaxdl, {"kind": kind, **bert.SIZES}, _spread(is_mapped=True))
        for kind in bert.KINDS
    },
}


def profile_workload(
    workload: Workload, *, steps: int = 10, is_best: bool = True, folder: str | Path | None = None
) -> StepProfile:
    """Sets a workload up and profiles its step.

    Args:
      workload: of `WORKLOADS`.
      steps: to trace.
      is_best: with the options of its best form.
      folder: as for `profile_step`.
    """
    import jax

    made = workload.side(**{**workload.sizes, **(workload.best if is_best else {})})

    def batches() -> Iterator[Any]:
        done = made.done
        while True:
            yield jax.device_put(made.batch(done), made.sharding)
            done += made.n

    return profile_step(made.call, made.state, batches(), steps=steps, steps_per_call=made.n, folder=folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the profile of one workload; 2 where something was refused."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    if not options.one and any(os.environ.get(name) != value for name, value in MEMORY_KEPT.items()):
        command = [sys.executable, "-m", "benchmarks.profile", *given]  # malloc reads these when a process starts
        os.execve(sys.executable, command, {**os.environ, **MEMORY_KEPT})
    try:
        found = profile_workload(
            WORKLOADS[options.name], steps=options.steps, is_best=not options.one, folder=options.folder
        )
    except JaxdlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{options.name}, {'one device' if options.one else 'best form'}\n{dataclasses.replace(found, top=options.top)}"
    )
    if options.json:
        options.json.write_text(found.to_json() + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description="Where the time of a step goes.")
    parser.add_argument("name", choices=WORKLOADS, help="the workload")
    parser.add_argument("--one", action="store_true", help="one device, and memory as glibc has it")
    parser.add_argument("--steps", type=int, default=10, help="to trace (default 10)")
    parser.add_argument("--top", type=int, default=20, help="rows of operations (default 20)")
    parser.add_argument("--folder", type=Path, help="keeps the trace")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
