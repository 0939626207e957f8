"""Where the time of jaxdl's steps on one GPU goes, of the workloads of `benchmarks.gpu.run`.

    python -m benchmarks.gpu.profile                    # one after the other
    python -m benchmarks.gpu.profile gpt --folder runs/profile/gpu
    python -m benchmarks.gpu.profile gpt --set chunk_tokens=8192
    python -m benchmarks.gpu.profile --tiny             # anywhere, to see that it works

CUDA graphs hide from the profiler which operation a kernel is of, so they are switched off here: the time that is said
to be without the trace is without them, too.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.workloads import WORKLOADS
from jaxdl.errors import JaxdlError
from jaxdl.profile import StepProfile, profile_step

NO_GRAPHS = "--xla_gpu_enable_command_buffer="


def profile_side(target: str, options: Mapping[str, Any], *, steps: int, folder: Path | None = None) -> StepProfile:
    """Sets jaxdl's side of a workload up and profiles its step.

    Args:
      target, options: of a `Competitor`, a subclass of `sides.Jaxdl`.
      steps, folder: as for `profile_step`.
    """
    import jax

    from benchmarks.gpu.sides import make_step
    from jaxdl import compiler_options

    module, _, name = target.partition(":")
    side = getattr(importlib.import_module(module), name)(**options)
    batches = [jax.device_put({k: v[i] for k, v in side.parts.batches.items()}) for i in range(2)]
    step = jax.jit(make_step(side.parts), donate_argnums=0, compiler_options=compiler_options())
    return profile_step(step, side.start(), batches, steps=steps, folder=folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a profile of each; 1 where one failed."""
    options = _parse(arguments)
    if not options.graphs:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_GRAPHS}".strip()
    started, failed = time.monotonic(), False
    for name in options.names or WORKLOADS:
        for competitor in WORKLOADS[name].competitors(options.tiny):
            if ":Jaxdl" not in competitor.target:
                continue
            title = f"{name}: {competitor.name}"
            if time.monotonic() - started > options.seconds:
                print(f"# {title}: not begun, {options.seconds} s are over", flush=True)
                continue
            folder = options.folder and options.folder / title.replace(": ", "-").replace(" ", "-").replace(",", "")
            given = {**competitor.options, **options.set}
            try:
                found = profile_side(competitor.target, given, steps=options.steps, folder=folder)
            except (JaxdlError, RuntimeError, TypeError) as error:
                print(f"# {title}: {type(error).__name__}: {error}", flush=True)
                failed = True
                continue
            print(f"# {title} ({time.monotonic() - started:.0f} s so far)\n{found}", flush=True)
    return int(failed)


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {', '.join(WORKLOADS)}; all without")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--graphs", action="store_true", help="leave CUDA graphs on")
    parser.add_argument("--steps", type=int, default=5, help="to trace (default 5)")
    parser.add_argument("--seconds", type=int, default=600, help="begin none after these (default 600)")
    parser.add_argument("--folder", type=Path, help="keeps the traces")
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="KEYWORD=VALUE", help="of the side"
    )
    options = parser.parse_args(arguments)
    options.set = dict(options.set)
    if unknown := [name for name in options.names if name not in WORKLOADS]:
        parser.error(f"there is no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    return options


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    with contextlib.suppress(json.JSONDecodeError):
        return name, json.loads(value)
    return name, value


if __name__ == "__main__":
    sys.exit(main())
