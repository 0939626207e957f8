"""What each process of the tests of many processes runs: `fit` on a small network, with a log of losses and rows.

python -m tests.many_processes mlp gpt --folder FOLDER --mesh data=2,model=2 --steps 20
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxdl import make_train_step
from jaxdl.checkpoint import Store
from jaxdl.data import ArraySource, Pipeline, eval_batches
from jaxdl.errors import JaxdlError
from jaxdl.evaluation import make_evaluator
from jaxdl.loop import fit
from jaxdl.parallel import (
    REPLICATED,
    initialize,
    is_first,
    make_mesh,
    parse_mesh,
    tensor_parallel,
    watchdog,
    with_fsdp,
    zero,
)
from jaxdl.parallel.exact import N_SHARDS
from jaxdl.report.writers import JsonlWriter
from tests import small_networks
from tests.prove_exact import digest

BATCH_SIZE, SEED, FLOOR_BYTES = 8, 3, 512
SHARDINGS = {
    "replicated": lambda state: REPLICATED,
    "fsdp": lambda state: zero(3, floor_bytes=FLOOR_BYTES),
    "fsdp_tensor": lambda state: with_fsdp(tensor_parallel(state), floor_bytes=FLOOR_BYTES),
}


class Logged(Pipeline):
    """A pipeline that writes down what it was asked for: the step and the rows."""

    def __getitem__(self, step: int) -> Any:
        with open(os.environ["ROWS_LOG"], "a") as file:
            file.write(json.dumps([step, self.rows(step).tolist()]) + "\n")
        return super().__getitem__(step)


def train(
    name: str,
    folder: Path,
    *,
    mesh: str,
    steps: int,
    sharding: str | None = None,
    is_exact: bool = False,
    stop_at: int | None = None,
    pause_s: float = 0.0,
) -> int:
    """Trains one network; the folder gets `losses.jsonl` of the first process and `rows_<process>.jsonl` of each.

    In exact mode there is dropout too, and the hash of the last state is printed.
    """
    task = small_networks.NETWORKS[name](dropout_rate=0.1 if is_exact else 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["ROWS_LOG"] = str(folder / f"rows_{jax.process_index()}.jsonl")
    data = Logged(ArraySource(task.data), batch_size=BATCH_SIZE, seed=SEED)
    step, options = make_train_step(task.loss_fn, task.optimizer(), trainable=task.trainable), dict[str, Any]()
    axes: Any = parse_mesh(mesh)
    if mesh != "data=1":
        rules = SHARDINGS[sharding or ("fsdp_tensor" if "model" in axes else "fsdp")](task.state())
        options = {"mesh": make_mesh(**axes), "sharding": rules}
    writer = Slow(folder / "losses.jsonl", pause_s)
    with contextlib.closing(writer), Store(folder / "checkpoints") as store:
        done = fit(
            task.state(),
            step,
            data,
            steps=steps,
            stop_at=stop_at,
            store=store,
            checkpoint_every=5,
            evaluators={"all": make_evaluator(task.loss_fn, eval_batches(ArraySource(task.data), BATCH_SIZE))},
            eval_every=10,
            log_every=1,
            writers=[writer] if is_first() else [],
            is_resident=False,
            exact_shards=N_SHARDS if is_exact else None,
            **options,
        )
    if is_exact:
        print(f"{name}: hash {digest(done.state)}", flush=True)
    print(f"{name}: stopped by {done.stopped_by} at step {int(done.state.step)}", flush=True)
    return int(done.state.step)


class Slow(JsonlWriter):
    """Waits at every row, so that a test can do something to a process in the middle."""

    def __init__(self, path: Path, pause_s: float) -> None:
        super().__init__(path)
        self._pause_s = pause_s

    def write(self, step: int, scalars: Any) -> None:
        time.sleep(self._pause_s)
        super().write(step, scalars)


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """The rows of the log by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update(row)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mesh", default="data=-1")
    parser.add_argument("--sharding", choices=SHARDINGS)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--pause-s", type=float, default=0.0)
    parser.add_argument("--deadline-s", type=float, default=60.0)
    parser.add_argument("--heartbeat-s", type=float, default=30.0)
    words = parser.parse_args(argv)
    try:
        initialize(deadline_s=words.deadline_s, heartbeat_s=words.heartbeat_s)
        for name in words.networks:
            train(
                name,
                words.folder / name,
                mesh=words.mesh,
                steps=words.steps,
                sharding=words.sharding,
                is_exact=words.exact,
                stop_at=words.stop_at,
                pause_s=words.pause_s,
            )
    except JaxdlError as error:
        print(f"error: {error}", file=sys.stderr)
        watchdog.tell_failure(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
