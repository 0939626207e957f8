"""A whole training step of an MLP 784-512-512-10, batch 128, AdamW, in all the ways that jaxdl can call it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import training
from benchmarks.harness import Competitor, Result, Settings, measure, spread
from benchmarks.network import BATCH_SIZE, SIZES, flops_per_step, make_network, make_torch, training_rows
from benchmarks.table import Table, time_cell
from benchmarks.training import COMPILED, EAGER, Aim, JaxdlParts

STEPS_PER_CALL = 50  # of `repeat`
N_BATCHES = 100  # batches in memory, used in turn
AIM = Aim(1.2, 1.45)


class Batches:
    """N_BATCHES batches of shuffled rows, contiguous in memory, and the rows that they were made of."""

    def __init__(self, sizes: Sequence[int], batch_size: int) -> None:
        self.features, self.label = training_rows(sizes, N_BATCHES * batch_size)
        order = np.random.default_rng(2).permutation(len(self.label)).astype(np.int32)
        self.rows = order.reshape(N_BATCHES, batch_size)
        self.batched = {"features": self.features[self.rows], "label": self.label[self.rows]}

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return {name: value[step % N_BATCHES] for name, value in self.batched.items()}


class Jaxdl(training.Jaxdl):
    """jaxdl's step on one device.

    Args:
      mode: `steps` calls it once a step; `repeat` once for STEPS_PER_CALL steps, with host batches; `resident` likewise
        with row numbers into arrays on the device.
      is_guarded: wrapped in `guard`, as the experiments do.
    """

    def __init__(self, mode: str, sizes: Sequence[int], batch_size: int, is_guarded: bool = False) -> None:
        self.mode, self.is_guarded = mode, is_guarded
        n = 1 if mode == "steps" else STEPS_PER_CALL
        super().__init__(steps_per_call=n, sizes=sizes, batch_size=batch_size)

    def make(self, sizes: Sequence[int], batch_size: int) -> JaxdlParts:
        self.rows = Batches(sizes, batch_size)
        return JaxdlParts(*make_network(sizes), self.rows.batched)

    def make_train_step(self) -> tuple[Any, Any]:
        from jaxdl import guard

        step, state = super().make_train_step()
        return (guard(step) if self.is_guarded else step), state

    def make_step(self) -> tuple[Any, Any]:
        import jax

        from jaxdl import compiler_options, repeat
        from jaxdl.step import on_rows

        if self.mode != "resident":
            return super().make_step()
        step, state = self.make_train_step()
        dataset = jax.device_put({"features": self.rows.features, "label": self.rows.label})

        def many(state: Any, dataset: Any, batch: Any) -> Any:
            return repeat(on_rows(step, dataset), self.n)(state, batch["rows"])

        self.parts = self.parts._replace(batches={"rows": self.rows.rows})
        self.plain = lambda state, batch: many(state, dataset, batch)
        options = compiler_options(many, state, dataset, self.batch(0))
        jitted = jax.jit(many, donate_argnums=0, compiler_options=options)
        return lambda state, batch: jitted(state, dataset, batch), state


class Torch(training.Torch):
    """`Linear` and `ReLU`."""

    def make(self, sizes: Sequence[int], batch_size: int) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        model = make_torch(sizes).to(self.device)

        def loss_fn(features: Any, label: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(features), label)

        return model, loss_fn, training.to_torch(Batches(sizes, batch_size).batched)


STEPS, GUARDED = "jaxdl, one call a step", "jaxdl, one call a step, guarded"
REPEAT, RESIDENT = f"jaxdl, repeat(step, {STEPS_PER_CALL})", f"jaxdl, on_rows and repeat({STEPS_PER_CALL})"
HOST_STEPS, HOST_REPEAT = "host only, one call a step", "host only, repeat"


def run(settings: Settings) -> list[Table]:
    """Measures everything in one go."""
    round_ = {"steps": 2 * STEPS_PER_CALL if settings.is_quick else 4 * STEPS_PER_CALL}
    sizes = {"sizes": SIZES, "batch_size": BATCH_SIZE}
    tiny = {"sizes": [1] * len(SIZES), "batch_size": 1}
    like = "benchmarks.mlp:Jaxdl"
    rows = [
        Competitor(EAGER, "benchmarks.mlp:Torch", sizes, round_),
        Competitor(STEPS, like, {"mode": "steps", **sizes}, round_),
        Competitor(COMPILED, "benchmarks.mlp:Torch", {"is_compiled": True, **sizes}, round_),
        Competitor(REPEAT, like, {"mode": "repeat", **sizes}, round_),
        Competitor(RESIDENT, like, {"mode": "resident", **sizes}, round_),
        Competitor(GUARDED, like, {"mode": "steps", "is_guarded": True, **sizes}, round_),
        *training.on_jax(like, sizes, round_, bare="mlp", keras="mlp"),
        training.PEAK_ROW,
        Competitor(HOST_STEPS, like, {"mode": "steps", **tiny}, round_),
        Competitor(HOST_REPEAT, like, {"mode": "repeat", **tiny}, round_),
    ]
    *results, host_steps, host_repeat = measure(rows, settings)
    return [to_table(results, host_steps, host_repeat)]


def to_table(results: Sequence[Result], host_steps: Result, host_repeat: Result) -> Table:
    """The table, and what the steps without work say of the host."""
    title = f"MLP {'-'.join(map(str, SIZES))}, batch {BATCH_SIZE}, AdamW: one training step"
    table = training.table(title, results, flops=flops_per_step(SIZES, BATCH_SIZE), aim=AIM)
    table.results = [*results, host_steps, host_repeat]
    table.notes.append(_host_note(host_steps, host_repeat))
    return table


def _host_note(one: Result, many: Result) -> str:
    if one.failure or many.failure:
        return "The host's part was not measured."
    return (
        "What `repeat` can save: the same step with all sizes 1, where only the host and the runtime work, takes "
        f"{time_cell(spread(one.seconds))} called one by one and {time_cell(spread(many.seconds))} inside `repeat`."
    )
