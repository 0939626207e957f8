"""From nothing to the first finished step of the MLP, in fresh processes; and what `import jaxdl` adds.

    python -m benchmarks.start_up jaxdl FOLDER     # what a fresh process does: prints the loss of its first step

The time is the wall clock's, from starting the interpreter to the loss on the host. Neither library gets its weights
from outside: creating them is part of starting.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import numpy as np

from benchmarks.harness import ROOT, BenchmarkError, Competitor, Result, Settings, fastest, measure, speed_up, spread
from benchmarks.network import BATCH_SIZE, LEARNING_RATE, SIZES, WEIGHT_DECAY, training_rows
from benchmarks.table import Aim, Table, judge, not_run, ratio_cell, time_cell

IMPORT_LIMIT_S = 0.2
AIM_EAGER, AIM_COMPILED = Aim(1.2, 1.8), Aim(2.0, 3.0)  # of a warm start
_IMPORT = "import time, jax, flax, optax; start = time.perf_counter(); import jaxdl; print(time.perf_counter() - start)"
_DEPENDENCIES = "import time; start = time.perf_counter(); import jax, flax, optax; print(time.perf_counter() - start)"


class Fresh:
    """Starts a Python process each round and waits for the line it prints.

    Args:
      arguments: of the interpreter.
      cache: `none`, `cold` (an empty folder each time) or `warm` (one folder, filled first). The folder is the last
        argument.
      is_self_timed: the line holds the seconds; else they are counted from the start of the process to the line.
      environment: variable -> value, in which `{cache}` stands for the folder.
    """

    def __init__(
        self, arguments: list[str], directory: str, cache: str = "none", is_self_timed: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.arguments, self.directory, self.cache = arguments, directory, cache
        self.is_self_timed, self.environment = is_self_timed, dict(environment or {})
        self.folder = tempfile.mkdtemp(dir=directory)
        self.round()  # fills the warm cache, and the file system's

    def round(self) -> float:
        """Seconds of a start."""
        folder = tempfile.mkdtemp(dir=self.directory) if self.cache == "cold" else self.folder
        environment = {name: value.format(cache=folder) for name, value in self.environment.items()}
        last = [] if self.cache == "none" else [folder]
        with tempfile.TemporaryFile("w+") as errors:
            start = time.perf_counter()
            with subprocess.Popen(
                [sys.executable, *self.arguments, *last],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process:
                assert process.stdout is not None
                line = process.stdout.readline()
                taken = time.perf_counter() - start
            errors.seek(0)
            said = errors.read().strip().splitlines()
        if process.returncode or not line:
            raise RuntimeError(said[-1] if said else f"the process ended with {process.returncode}")
        return float(line) if self.is_self_timed else taken


def first_jaxdl_step(cache: str) -> float:
    """The loss of the first step of a new state, with the compile cache in a folder."""
    import jax

    from jaxdl import create_state, make_optimizer, make_train_step
    from jaxdl.compilation import enable_compile_cache
    from jaxdl.models import MLP
    from jaxdl.models.apply import init_model, make_loss_fn
    from jaxdl.objectives import classification

    enable_compile_cache(cache)
    batch = dict(zip(("features", "label"), training_rows(SIZES, BATCH_SIZE), strict=True))
    model = MLP(widths=SIZES[1:-1], n_outputs=SIZES[-1])
    tx = make_optimizer("adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    params, extra = init_model(model, jax.random.key(0), batch["features"])
    state = create_state(params, extra, tx, rng=jax.random.key(1))
    loss_fn = make_loss_fn(model, classification(), inputs="features", train=True)
    step = jax.jit(make_train_step(loss_fn, tx), donate_argnums=0)
    return step(state, batch)[1]["loss"].finish()


def first_torch_step(is_compiled: bool) -> float:
    """The loss of the first step of a new model."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    features, label = (torch.from_numpy(part).to(device) for part in training_rows(SIZES, BATCH_SIZE))
    layers = [
        layer for n_in, n_out in itertools.pairwise(SIZES) for layer in (torch.nn.Linear(n_in, n_out), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    forward = torch.compile(model) if is_compiled else model
    loss = torch.nn.functional.cross_entropy(forward(features), label.long())
    loss.backward()
    optimizer.step()
    return loss.item()


JAXDL_COLD, JAXDL_WARM = "jaxdl, empty compile cache", "jaxdl, warm compile cache"
EAGER, COMPILED = "PyTorch eager", "PyTorch torch.compile, warm cache"
IMPORT, DEPENDENCIES = "import jaxdl, after jax, flax and optax", "import jax, flax, optax"


def run(settings: Settings) -> list[Table]:
    """Two tables: first steps and imports."""
    this = ["-m", "benchmarks.start_up"]
    with tempfile.TemporaryDirectory() as directory:

        def fresh(name: str, arguments: list[str], **options: object) -> Competitor:
            return Competitor(
                name, "benchmarks.start_up:Fresh", {"arguments": arguments, "directory": directory, **options}
            )

        inductor = {"environment": {"TORCHINDUCTOR_CACHE_DIR": "{cache}"}}
        steps = measure(
            [
                fresh(JAXDL_COLD, [*this, "jaxdl"], cache="cold"),
                fresh(JAXDL_WARM, [*this, "jaxdl"], cache="warm"),
                fresh(EAGER, [*this, "torch"]),
                fresh(COMPILED, [*this, "torch.compile"], cache="warm", **inductor),
            ],
            settings,
        )
        imports = measure(
            [
                fresh(IMPORT, ["-c", _IMPORT], is_self_timed=True),
                fresh(DEPENDENCIES, ["-c", _DEPENDENCIES], is_self_timed=True),
            ],
            settings,
        )
    return [_steps_table(steps), _imports_table(imports)]


def _steps_table(results: list[Result]) -> Table:
    best = fastest(results[2:])
    table = Table(
        "From starting Python to the first finished step of the MLP",
        ["", "time", f"speed against {best.name}"],
        results=results,
    )
    for result in results:
        if result.failure:
            table.rows.append(not_run(result.name, result.failure, 3))
        else:
            table.rows.append([result.name, time_cell(spread(result.seconds)), ratio_cell(speed_up(result, best))])
    _, warm, eager, compiled = results
    for other, aim in ((eager, AIM_EAGER), (compiled, AIM_COMPILED)):
        word = judge(speed_up(warm, other), aim)
        table.notes.append(f"{warm.name}, against {other.name}: floor {aim.floor}, aim {aim.aim}: {word}.")
    return table


def _imports_table(results: list[Result]) -> Table:
    table = Table("Importing", ["", "time"], results=results)
    for result in results:
        if result.failure:
            raise BenchmarkError(f"{result.name}: {result.failure}")
        table.rows.append([result.name, time_cell(spread(result.seconds))])
    word = "kept" if results[0].median_s <= IMPORT_LIMIT_S else "**broken**"
    table.notes.append(f"The limit of {IMPORT_LIMIT_S} s for `import jaxdl` alone is {word}.")
    return table


def main() -> None:
    """What a fresh process does."""
    kind = sys.argv[1]
    loss = first_jaxdl_step(sys.argv[2]) if kind == "jaxdl" else first_torch_step(kind == "torch.compile")
    if not np.isfinite(loss):
        raise RuntimeError(f"the first loss is {loss}")
    print(loss, flush=True)


if __name__ == "__main__":
    main()
