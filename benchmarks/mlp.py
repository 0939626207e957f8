"""A whole training step of an MLP 784-512-512-10, batch 128, AdamW: jaxdl and PyTorch on the same numbers.

The weights, the batches and their order are the same everywhere, and the first losses are compared. Batches lie in
host memory; moving them to the device is in the time. jaxdl's step also computes the accuracy and the gradient norm.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import training
from benchmarks.harness import Competitor, Result, Settings, check_same_losses, fastest, measure, spread
from benchmarks.machine import n_cores, use_full_float32
from benchmarks.network import BATCH_SIZE, SIZES, flops_per_step, make_jaxdl, make_torch, training_rows
from benchmarks.table import Table, time_cell

STEPS_PER_CALL = 50  # of `repeat`
N_BATCHES = 100  # batches in memory, used in turn
FLOOR, AIM = 1.2, 1.45
TOLERANCE, N_LOSSES = 1e-4, 5


class Batches:
    """N_BATCHES batches of shuffled rows, contiguous in memory, and the rows that they were made of."""

    def __init__(self, sizes: Sequence[int], batch_size: int) -> None:
        self.features, self.label = training_rows(sizes, N_BATCHES * batch_size)
        order = np.random.default_rng(2).permutation(len(self.label)).astype(np.int32)
        self.rows = order.reshape(N_BATCHES, batch_size)
        self.batched = {"features": self.features[self.rows], "label": self.label[self.rows]}

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return {name: value[step % N_BATCHES] for name, value in self.batched.items()}

    def chunk(self, step: int, n: int) -> dict[str, np.ndarray]:
        """The batches of n steps with a new first axis; a view."""
        first = step % N_BATCHES
        return {name: value[first : first + n] for name, value in self.batched.items()}


class Jaxdl:
    """jaxdl's jitted step with donated state.

    Args:
      mode: `steps` calls it once a step; `repeat` once for STEPS_PER_CALL steps, with host batches; `resident` likewise
        with row numbers into arrays on the device.
      is_guarded: wrapped in `guard`, as the experiments do.
    """

    def __init__(
        self, mode: str, sizes: Sequence[int] = SIZES, batch_size: int = BATCH_SIZE, is_guarded: bool = False
    ) -> None:
        import jax

        from jaxdl import guard

        use_full_float32()
        self.batches = Batches(sizes, batch_size)
        step, self.state = make_jaxdl(sizes)
        self.call, self.n = self._make(mode, guard(step) if is_guarded else step)
        losses: list[float] = []
        self.done = 0
        while len(losses) < N_LOSSES:
            losses += np.atleast_1d(jax.device_get(self._step()["loss"].total)).tolist()
        self.facts = {"first_losses": [loss / batch_size for loss in losses[:N_LOSSES]]}

    def _make(self, mode: str, step: Any) -> tuple[Any, int]:
        import jax

        from jaxdl import repeat
        from jaxdl.step import on_rows

        if mode == "resident":
            dataset = jax.device_put({"features": self.batches.features, "label": self.batches.label})
            many = jax.jit(
                lambda state, dataset, rows: repeat(on_rows(step, dataset), STEPS_PER_CALL)(state, rows),
                donate_argnums=0,
            )

            def call(state: Any, i: int) -> Any:
                rows = self.batches.rows[i % N_BATCHES :][:STEPS_PER_CALL]
                return many(state, dataset, jax.device_put(rows))

            return call, STEPS_PER_CALL
        if mode == "repeat":
            many = jax.jit(repeat(step, STEPS_PER_CALL), donate_argnums=0)
            chunk = partial(self.batches.chunk, n=STEPS_PER_CALL)
            return lambda state, i: many(state, jax.device_put(chunk(i))), STEPS_PER_CALL
        one = jax.jit(step, donate_argnums=0)
        return lambda state, i: one(state, jax.device_put(self.batches[i])), 1

    def _step(self) -> Any:
        self.state, metrics = self.call(self.state, self.done)
        self.done += self.n
        return metrics

    def round(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them after a few that are not timed."""
        self._run(max(self.n, steps // 10))
        start = time.perf_counter()
        self._run(steps)
        return (time.perf_counter() - start) / steps

    def _run(self, steps: int) -> None:
        import jax

        for _ in range(steps // self.n):
            self._step()
        jax.block_until_ready(self.state)


class Torch:
    """PyTorch's usual loop; with `is_compiled`, model and loss go through `torch.compile`."""

    def __init__(self, is_compiled: bool, sizes: Sequence[int] = SIZES, batch_size: int = BATCH_SIZE) -> None:
        import torch

        torch.set_num_threads(n_cores())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model, self.optimizer = make_torch(sizes, self.device)

        def loss_fn(features: Any, label: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(features), label)

        self.loss_fn = torch.compile(loss_fn) if is_compiled else loss_fn
        batches = Batches(sizes, batch_size)
        self.batches = [
            (torch.from_numpy(batches[i]["features"]), torch.from_numpy(batches[i]["label"]).long())
            for i in range(N_BATCHES)
        ]
        self.done = 0
        self.facts = {"first_losses": [self._step().item() for _ in range(N_LOSSES)]}

    def _step(self) -> Any:
        features, label = (part.to(self.device) for part in self.batches[self.done % N_BATCHES])
        loss = self.loss_fn(features, label)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss

    def round(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them after a few that are not timed."""
        self._run(steps // 10)
        start = time.perf_counter()
        self._run(steps)
        return (time.perf_counter() - start) / steps

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            loss = self._step()
        loss.item()


EAGER, COMPILED = "PyTorch eager", "PyTorch torch.compile"
STEPS, GUARDED = "jaxdl, one call a step", "jaxdl, one call a step, guarded"
REPEAT, RESIDENT = f"jaxdl, repeat(step, {STEPS_PER_CALL})", f"jaxdl, on_rows and repeat({STEPS_PER_CALL})"
PEAK = "matrix product"
HOST_STEPS, HOST_REPEAT = "host only, one call a step", "host only, repeat"


def run(settings: Settings) -> list[Table]:
    """Measures everything in one go."""
    steps = {"steps": 2 * STEPS_PER_CALL if settings.is_quick else 6 * STEPS_PER_CALL}
    tiny = {"sizes": [1] * len(SIZES), "batch_size": 1}
    results = {
        result.name: result
        for result in measure(
            [
                Competitor(EAGER, "benchmarks.mlp:Torch", {"is_compiled": False}, steps),
                Competitor(STEPS, "benchmarks.mlp:Jaxdl", {"mode": "steps"}, steps),
                Competitor(COMPILED, "benchmarks.mlp:Torch", {"is_compiled": True}, steps),
                Competitor(REPEAT, "benchmarks.mlp:Jaxdl", {"mode": "repeat"}, steps),
                Competitor(RESIDENT, "benchmarks.mlp:Jaxdl", {"mode": "resident"}, steps),
                Competitor(GUARDED, "benchmarks.mlp:Jaxdl", {"mode": "steps", "is_guarded": True}, steps),
                Competitor(PEAK, "benchmarks.machine:Matmul"),
                Competitor(HOST_STEPS, "benchmarks.mlp:Jaxdl", {"mode": "steps", **tiny}, steps),
                Competitor(HOST_REPEAT, "benchmarks.mlp:Jaxdl", {"mode": "repeat", **tiny}, steps),
            ],
            settings,
        )
    }
    return [_table(results)]


def _table(results: dict[str, Result]) -> Table:
    same = [results[name] for name in (EAGER, COMPILED, STEPS, GUARDED, REPEAT, RESIDENT)]
    difference = check_same_losses(same, TOLERANCE)
    best = fastest([results[EAGER], results[COMPILED]])
    flops, peak = flops_per_step(SIZES, BATCH_SIZE), results[PEAK].median_s
    table = Table(
        f"MLP {'-'.join(map(str, SIZES))}, batch {BATCH_SIZE}, AdamW: one training step",
        ["", "time of a step", f"speed against {best.name}", "GFLOP/s", "of the peak"],
        results=list(results.values()),
    )
    table.rows = training.step_rows(same, best, flops, peak)
    table.notes = [
        f"Peak: {1 / peak / 1e9:.0f} GFLOP/s (XLA, float32 product of two matrices of 1536 x 1536, same rounds). First "
        f"{N_LOSSES} losses agree to {difference:.0e} (allowed {TOLERANCE:.0e}).",
        verdict([results[name] for name in (STEPS, REPEAT, RESIDENT)], best),
        _host_note(results),
    ]
    return table


def verdict(ours: Sequence[Result], best: Result) -> str:
    """How the variants stand to floor and aim, in words."""
    return training.verdict(ours, best, training.Aim(FLOOR, AIM))


def _host_note(results: dict[str, Result]) -> str:
    one, many = results[HOST_STEPS], results[HOST_REPEAT]
    if one.failure or many.failure:
        return "The host's part was not measured."
    return (
        "What `repeat` can save: the same step with all sizes 1, where only the host and the runtime work, takes "
        f"{time_cell(spread(one.seconds))} called one by one and {time_cell(spread(many.seconds))} inside `repeat`."
    )
