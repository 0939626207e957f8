"""Trains five small networks over every layout of devices, and shows that exact mode ends with the same bits.

    python -m tests.prove_exact [--steps 200] [--networks mlp gpt] [--layouts "1 device" "8, FSDP"] [--costs]

Each layout runs in a process of its own that has no more devices than it needs, so that thread pools differ too. All
networks train with dropout 0.1 and two microbatches; those that see images also with random crops. The hash is the
SHA-256 of every leaf of the last state and of the metric log. The default mode, over a few of the layouts, shows that
bits do differ. `--costs` times a GPT of 3.5 M parameters in both modes over every layout, and says what the compiler
plans for a device (state, batch, gradients, temporaries). The exit code is 1 if a hash of exact mode differs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdl import make_train_step
from jaxdl.checkpoint.leaves import to_host
from jaxdl.data import ArraySource, Pipeline, random_crop
from jaxdl.loop import fit
from jaxdl.models.apply import init_model
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.language import make_language_loss_fn
from jaxdl.parallel import (
    constrained,
    initialize,
    is_first,
    make_mesh,
    parse_mesh,
    put_batch,
    state_shardings,
    tensor_parallel,
    with_fsdp,
)
from jaxdl.parallel.exact import N_SHARDS, ExactStep
from jaxdl.parallel.presets import REPLICATED, zero
from jaxdl.parallel.sharding import bytes_per_device, n_bytes
from tests import small_networks

ROOT = Path(__file__).parents[1]
LAYOUTS = {  # mesh, sharding, processes
    "1 device": ("data=1", "replicated", 1),
    "2 devices": ("data=2", "replicated", 1),
    "4 devices": ("data=4", "replicated", 1),
    "8 devices": ("data=8", "replicated", 1),
    "8, ZeRO 1": ("data=8", "zero1", 1),
    "8, FSDP": ("data=8", "fsdp", 1),
    "4 x 2, FSDP x tensor": ("data=4,model=2", "fsdp_tensor", 1),
    "2 processes": ("data=2", "replicated", 2),
    "4 processes, 8 devices": ("data=8", "replicated", 4),
}
DIFFER = ("1 device", "8 devices")
FLOOR_BYTES = 512


def gpt_3m(dropout_rate: float = 0.0) -> small_networks.Task:
    """A GPT of 3.5 M parameters on 16 rows of 128 tokens: what the mode costs where a step is more than overhead."""
    block = gpt2_block(width=256, n_heads=4, dropout_rate=dropout_rate)
    model = GPT2(block, n_layers=4, vocab_size=1024, n_positions=128)
    text = np.random.default_rng(0).integers(0, 1024, (small_networks.N_ROWS, 129)).astype(np.int32)
    data = {"tokens": text[:, :-1], "targets": text[:, 1:]}
    params, _ = init_model(model, jax.random.key(0), data["tokens"][:1])
    return small_networks.Task(make_language_loss_fn(model, train=True), params, data)


NETWORKS = small_networks.NETWORKS | {"gpt_3m": gpt_3m}


def rules(sharding: str, state: Any) -> Any:
    return {
        "replicated": REPLICATED,
        "zero1": zero(1, floor_bytes=FLOOR_BYTES),
        "fsdp": zero(3, floor_bytes=FLOOR_BYTES),
        "fsdp_tensor": with_fsdp(tensor_parallel(state), floor_bytes=FLOOR_BYTES),
    }[sharding]


class Kept:
    """A writer that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def resume(self, step: int) -> None:
        """Nothing was written before."""

    def write(self, step: int, row: Any) -> None:
        self.rows.append([step, *sorted(row.items())])

    def flush(self) -> None:
        """It is all in memory."""


def digest(state: Any, rows: Any = ()) -> str:
    """One SHA-256 of every leaf's path, dtype, shape and bytes, and of a metric log.

    Example:
      >>> digest({"w": np.ones(2, np.float32)})[:8] == digest({"w": np.array([1.0, 1.0], np.float32)})[:8]
      True
    """
    found = hashlib.sha256(json.dumps(rows).encode())
    arrays, records = to_host(state)
    for path in sorted(arrays):
        found.update(f"{path} {records[path]}".encode() + arrays[path].tobytes())
    return found.hexdigest()


def train(name: str, mesh: Any, sharding: str, *, exact: bool, steps: int) -> dict[str, Any]:
    """Trains one of the small networks with `fit`.

    Returns:
      The digest and the milliseconds of a step.
    """
    task = NETWORKS[name](dropout_rate=0.1)
    transforms = [random_crop(1)] if "image" in task.data else []
    data = Pipeline(ArraySource(task.data), batch_size=small_networks.N_ROWS, seed=3, transforms=transforms)
    step = make_train_step(task.loss_fn, task.optimizer(), trainable=task.trainable, microbatches=2)
    state, kept = task.state(), Kept()
    result = fit(
        state,
        step,
        data,
        steps=steps,
        log_every=10,
        writers=[kept],
        is_resident=False,
        mesh=mesh,
        sharding=rules(sharding, state),
        exact_shards=N_SHARDS if exact else None,
    )
    if result.stopped_by:
        raise RuntimeError(f"stopped by {result.stopped_by}: there is no hash of {steps} steps")
    ms = 1000 * result.timing.train_s / max(result.timing.steps - 1, 1)
    return {"hash": digest(result.state, kept.rows), "ms": ms}


def planned_bytes(name: str, mesh: Any, sharding: str, *, exact: bool) -> int:
    """What the compiler plans for one device: the state, and at the same time the batch, gradients and temporaries."""
    task = NETWORKS[name](dropout_rate=0.1)
    step = make_train_step(task.loss_fn, task.optimizer(), trainable=task.trainable, microbatches=2)
    state = task.state()
    shardings = state_shardings(rules(sharding, state), state, mesh)
    state = jax.device_put(state, shardings)
    if exact:
        return exact_bytes(ExactStep(step.halves, mesh, shardings), state, task.data)  # type: ignore[attr-defined]
    batch = put_batch(task.data, mesh)
    compiled = jax.jit(constrained(step, mesh, shardings), donate_argnums=0).lower(state, batch).compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(held + memory.temp_size_in_bytes)


def exact_bytes(run: ExactStep, state: Any, batch: Any) -> int:
    """The larger of the two halves: the whole state, with rows and open sums, or with a sum and the update."""
    n, shardings = run.n_shards // run.mesh.size, jax.tree.map(lambda x: x.sharding, state)
    whole = sum(map(n_bytes, jax.tree.leaves(state)))
    stored = bytes_per_device(state, shardings)
    rows = 2 * sum(leaf.nbytes for leaf in batch.values()) // run.mesh.size  # as they came, and cut into shards
    run(state, batch)
    gradient, update = (program._executable.memory_analysis() for program in run._programs[0][:2])
    sums = gradient.output_size_in_bytes
    first = rows + gradient.temp_size_in_bytes + sums * (n.bit_length() + 1)
    second = sums + update.temp_size_in_bytes + update.output_size_in_bytes - update.alias_size_in_bytes
    return int(whole + (0 if stored == whole else stored) + max(first, second))


def work(layout: str, steps: int, networks: Sequence[str], costs: bool) -> None:
    """Prints a line of JSON for each network and mode: this process has the devices of the layout and no more."""
    axes, sharding, n_processes = LAYOUTS[layout]
    sizes = parse_mesh(axes)
    if n_processes == 1:
        jax.config.update("jax_num_cpu_devices", int(np.prod(list(sizes.values()))))
    initialize()
    mesh = make_mesh(**sizes)  # type: ignore[arg-type]
    for name in networks:
        for exact in (True, False) if costs or layout in DIFFER else (True,):
            found = train(name, mesh, sharding, exact=exact, steps=steps)
            if costs:
                found["mib"] = planned_bytes(name, mesh, sharding, exact=exact) / 2**20
            if is_first():
                print(json.dumps({"layout": layout, "network": name, "exact": exact} | found), flush=True)


def run(layout: str, options: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a layout, from processes that have its devices and no more."""
    axes, _, n = LAYOUTS[layout]
    n_devices = int(np.prod(list(parse_mesh(axes).values())))
    launch = ["jaxdl", "launch", "-n", str(n), "--cpu-devices", str(n_devices // n), "--", sys.executable, "-m"]
    module = ["tests.prove_exact", "--here", "--layouts", layout, *options]
    command = [sys.executable, "-m", *([] if n == 1 else launch), *module]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if '{"layout"' in line]


def hash_table(found: list[dict[str, Any]]) -> list[str]:
    """Rows of Markdown: a network a column, a layout a row."""
    networks = list(dict.fromkeys(row["network"] for row in found))
    lines = [f"| layout | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    for exact in (True, False):
        for layout in dict.fromkeys(row["layout"] for row in found if row["exact"] == exact):
            of = {row["network"]: row["hash"] for row in found if (row["layout"], row["exact"]) == (layout, exact)}
            title = layout if exact else f"default mode, {layout}"
            lines.append(f"| {title} | {' | '.join(f'`{of[name][:10]}`' for name in networks)} |")
    return lines


def cost_table(found: list[dict[str, Any]]) -> list[str]:
    """Rows of Markdown: both modes over each layout."""
    lines = [
        "| layout | ms a step, default | exact | MiB a device, default | exact |",
        "|---|---:|---:|---:|---:|",
    ]
    by = {(row["layout"], row["exact"]): row for row in found}
    for layout in dict.fromkeys(row["layout"] for row in found):
        default, ours = by[layout, False], by[layout, True]
        lines.append(
            f"| {layout} | {default['ms']:.0f} | {ours['ms']:.0f} | {default['mib']:.1f} | {ours['mib']:.1f} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="200, or 10 with --costs")
    parser.add_argument("--networks", nargs="+", choices=small_networks.NETWORKS, default=None)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--costs", action="store_true", help="times a larger GPT instead")
    parser.add_argument("--here", action="store_true", help="run the one layout in this process")
    given = parser.parse_args(argv)
    steps = given.steps or (10 if given.costs else 200)
    networks = ["gpt_3m"] if given.costs else given.networks or list(small_networks.NETWORKS)
    if given.here:
        work(given.layouts[0], steps, networks, given.costs)
        return 0
    found: list[dict[str, Any]] = []
    for layout in given.layouts:
        options = ["--costs"] if given.costs else ["--networks", *networks]
        found += run(layout, [*options, "--steps", str(steps)])
        print(f"{layout}: done", file=sys.stderr, flush=True)
    print("\n".join(cost_table(found) if given.costs else hash_table(found)))
    counts = {name: len({row["hash"] for row in found if row["network"] == name and row["exact"]}) for name in networks}
    is_same = set(counts.values()) == {1}
    print(f"\n{steps} steps: " + ("one hash a network in exact mode" if is_same else f"DIFFERENT BITS: {counts}"))
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
