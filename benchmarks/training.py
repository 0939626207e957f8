"""A whole training step of some network in both libraries: same weights, same batches, same losses; and its table.

A workload subclasses `Jaxdl` and `Torch`, which say what is computed; `bare_jax` and `keras_models` take weights and
batches from its `Jaxdl`. Batches lie in host memory and are used in turn; moving them to the device is in the time. The
optimizer is AdamW on every trainable leaf. jaxdl's step also computes its metrics and the gradient norm, which no other
does.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import (
    Competitor,
    Result,
    Settings,
    check_same_losses,
    fastest,
    speed_up,
    spread,
)
from benchmarks.machine import n_cores, use_full_float32
from benchmarks.table import Aim, Table, judge, not_run, ratio_cell, time_cell

N_BATCHES = 4  # batches in memory, used in turn
TOLERANCE, N_LOSSES = 1e-4, 3
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2
EAGER, COMPILED, KEPT = "PyTorch eager", "PyTorch torch.compile", "PyTorch eager, memory kept"
ONE, PEAK = "jaxdl", "matrix product"
BARE, KERAS = "bare JAX, by hand", "Keras 3 on JAX, fit"
# glibc keeps what is freed, so that the large arrays of the next step need no new pages; it helps both libraries.
MEMORY_KEPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}


class JaxdlParts(NamedTuple):
    """What a workload gives to `Jaxdl`.

    Attributes:
      loss_fn, params, extra, trainable: as for `make_train_step` and `create_state`.
      batches: {name: (N, B, ...)}, used in turn.
    """

    loss_fn: Any
    params: Any
    batches: Mapping[str, np.ndarray]
    extra: Any = {}  # noqa: RUF012
    trainable: Sequence[tuple[str, bool]] = ((".*", True),)


class Jaxdl:
    """jaxdl's jitted step with donated state.

    Attributes:
      axis_name: of the mapped axis, for what a network computes over the whole batch; None where nothing is mapped.

    Args:
      n_devices: the batch is sharded over this many devices, one a core on a CPU.
      is_mapped: each device runs the step on its shard (`shard_map`, as `pmap` would), instead of XLA cutting it.
      steps_per_call: of `repeat`; 1 calls the step itself.
      sizes: of the workload.
    """

    def __init__(
        self,
        n_devices: int = 1,
        is_mapped: bool = False,
        steps_per_call: int = 1,
        **sizes: Any,
    ) -> None:
        self.mesh = data_mesh(n_devices)  # before anything else touches JAX
        use_full_float32()
        self.axis_name = "data" if is_mapped else None
        self.parts, self.n, self.done = self.make(**sizes), steps_per_call, 0
        self.call, self.state = self.make_step()
        self.first: list[Any] = []  # what the first calls returned
        self._run(1)

    @property
    def facts(self) -> dict[str, Any]:
        """The first losses, by further steps where there were too few; what the optimizer holds; FLOPs of a step."""
        import jax

        from jaxdl.plan.flops import count_flops

        while self.n * len(self.first) < N_LOSSES:
            self._run(1)
        moments = jax.tree.leaves(getattr(self.state, "opt_state", ()))
        return {
            "first_losses": [loss for told in self.first for loss in self.losses(jax.device_get(told))][:N_LOSSES],
            "optimizer_bytes": sum(leaf.nbytes for leaf in moments),
            "flops": count_flops(self.plain or self.call, self.state, self.batch(0)).total() / self.n,
        }

    sharding: Any = None  # of what a call gets; None where there is one device
    plain: Any = None  # what `call` jits, if with compiler options, which JAX takes at the top only
    make: Callable[..., JaxdlParts]  # the workload's network, weights and batches, from its sizes

    def make_step(self) -> tuple[Callable[..., Any], Any]:
        """The function of `(state, batch)` that is timed, and the first state."""
        import jax
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        from jaxdl import compiler_options, repeat

        step, state = self.make_train_step()
        step, rows = (step, P("data")) if self.n == 1 else (repeat(step, self.n), P(None, "data"))
        if self.axis_name:
            step = jax.shard_map(step, mesh=self.mesh, in_specs=(P(), rows), out_specs=P(), check_vma=False)
        if self.mesh.size > 1:
            self.sharding = NamedSharding(self.mesh, rows)
            state = jax.device_put(state, NamedSharding(self.mesh, P()))
        self.plain, options = step, compiler_options(step, state, self.batch(0))
        return jax.jit(step, donate_argnums=0, compiler_options=options), state

    def make_train_step(self) -> tuple[Callable[..., Any], Any]:
        """jaxdl's step on one batch, not jitted, and the first state."""
        import jax

        from jaxdl import create_state, make_train_step

        parts, tx = self.parts, make_adamw()
        state = create_state(parts.params, parts.extra, tx, rng=jax.random.key(0), trainable=parts.trainable)
        return make_train_step(parts.loss_fn, tx, trainable=parts.trainable, axis_name=self.axis_name), state

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """What the next call gets: a batch, or one for each of its steps; a view where they lie side by side."""
        batches = self.parts.batches
        n_batches = len(next(iter(batches.values())))
        first = step % n_batches
        if self.n == 1:
            return {name: value[first] for name, value in batches.items()}
        side_by_side = slice(first, first + self.n)
        numbers = side_by_side if first + self.n <= n_batches else (first + np.arange(self.n)) % n_batches
        return {name: value[numbers] for name, value in batches.items()}

    def losses(self, metrics: Any) -> list[float]:
        """The mean loss of each step of a call."""
        return np.atleast_1d(metrics["loss"].total / metrics["loss"].weight).tolist()

    def _step(self) -> None:
        import jax

        self.state, told = self.call(self.state, jax.device_put(self.batch(self.done), self.sharding))
        self.done += self.n
        if self.n * len(self.first) < N_LOSSES:
            self.first.append(told)

    def round(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them after a few that are not timed."""
        return timed(self._run, steps, self.n)

    def _run(self, calls: int) -> None:
        import jax

        for _ in range(calls):
            self._step()
        jax.block_until_ready(self.state)


class Torch:
    """PyTorch's usual loop with fused AdamW; with `is_compiled`, model and loss go through `torch.compile`.

    Args:
      is_compiled: see above.
      sizes: of the workload.
    """

    def __init__(self, is_compiled: bool = False, **sizes: Any) -> None:
        import torch

        torch.set_num_threads(n_cores())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.done = 0
        model, loss_fn, self.batches = self.make(**sizes)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        self.loss_fn = torch.compile(loss_fn) if is_compiled else loss_fn
        self.first: list[Any] = []  # losses
        self._run(1)

    @property
    def facts(self) -> dict[str, Any]:
        """The first losses, by further steps where there were too few."""
        while len(self.first) < N_LOSSES:
            self._run(1)
        return {"first_losses": [loss.item() for loss in self.first]}

    # (model on `self.device`, loss of a batch's tensors as keywords, batches on the host), from the sizes
    make: Callable[..., tuple[Any, Any, list[dict[str, Any]]]]

    def _step(self) -> Any:
        batch = {name: part.to(self.device) for name, part in self.batches[self.done % len(self.batches)].items()}
        loss = self.loss_fn(**batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if len(self.first) < N_LOSSES:
            self.first.append(loss.detach())
        return loss

    def round(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them after a few that are not timed."""
        return timed(self._run, steps)

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            loss = self._step()
        if steps:
            loss.item()


def timed(run: Callable[[int], None], steps: int, steps_per_call: int = 1) -> float:
    """Seconds of a step: an eighth more of them goes before and is not timed."""
    calls = max(1, steps // steps_per_call)
    run(-(-calls // 8) if calls >= 4 else 0)
    start = time.perf_counter()
    run(calls)
    return (time.perf_counter() - start) / (calls * steps_per_call)


def data_mesh(n_devices: int) -> Any:
    """A mesh with the axis `data`. On a CPU as many devices are made; call it before JAX starts.

    Raises:
      RuntimeError: there are not as many devices.
    """
    import jax

    if n_devices > 1:
        jax.config.update("jax_num_cpu_devices", n_devices)
    if len(jax.devices()) < n_devices:
        raise RuntimeError(f"{n_devices} devices are wanted and there are {len(jax.devices())}")
    axis = jax.sharding.AxisType.Auto
    return jax.make_mesh((n_devices,), ("data",), axis_types=(axis,), devices=jax.devices()[:n_devices])


def make_adamw() -> Any:
    """AdamW as `torch.optim.AdamW` has it: every leaf decays."""
    from jaxdl import make_optimizer

    return make_optimizer(
        "adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, weight_decay_rules=[(".*", 1.0)]
    )


def to_torch(batches: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """{name: (N, B, ...)} -> a dict of tensors for each batch; whole numbers become int64."""
    import torch

    def tensor(part: np.ndarray) -> Any:
        return torch.from_numpy(part if part.dtype == np.float32 else part.astype(np.int64))

    n_batches = len(next(iter(batches.values())))
    return [{name: tensor(part[i]) for name, part in batches.items()} for i in range(n_batches)]


def competitors(
    module: str,
    sizes: Mapping[str, Any],
    settings: Settings,
    *,
    steps: int,
    suffix: str = "",
    steps_per_call: int = 1,
    is_mapped: bool = False,
    torch_variants: Mapping[str, Mapping[str, Any]] = {},
    bare: str | None = None,
    keras: str | None = None,
    on_jax_steps: int | None = None,
) -> list[Competitor]:
    """Who is measured in a workload, in the order of the rounds.

    Args:
      module: has the classes `Jaxdl<suffix>` and `Torch<suffix>`.
      sizes: of the workload.
      settings: of the run.
      steps: of a round.
      suffix: see `module`.
      steps_per_call, is_mapped: of jaxdl's best form, which has a device a core and MEMORY_KEPT.
      torch_variants: further rows of PyTorch: name -> options.
      bare, keras: the network's name in `bare_jax` and in `keras_models`; None for no such row.
      on_jax_steps: of a round of these two, where they are so slow that fewer than `steps` do.
    """
    round_ = {"steps": steps_per_call if settings.is_quick else steps}
    torch_class, jaxdl_class = f"{module}:Torch{suffix}", f"{module}:Jaxdl{suffix}"
    best = {"n_devices": n_cores(), "is_mapped": is_mapped, "steps_per_call": steps_per_call}
    theirs = {EAGER: {}, COMPILED: {"is_compiled": True}, KEPT: {}, **torch_variants}

    def row(name: str, target: str, options: Mapping[str, Any]) -> Competitor:
        environment = MEMORY_KEPT if name.endswith("memory kept") else {}
        return Competitor(name, target, {**sizes, **options}, round_, environment)

    rows = [row(name, torch_class, options) for name, options in theirs.items()]
    rows[1:1] = [row(ONE, jaxdl_class, {}), row(best_name(best), jaxdl_class, best)]
    theirs_on_jax = round_ if settings.is_quick else {"steps": on_jax_steps or steps}
    return [*rows, *on_jax(jaxdl_class, sizes, theirs_on_jax, bare=bare, keras=keras), PEAK_ROW]


def on_jax(
    like: str, sizes: Mapping[str, Any], round_: Mapping[str, Any], *, bare: str | None, keras: str | None
) -> list[Competitor]:
    """The other ways to train on JAX: the step written by hand, and Keras; each takes what `like`, a Jaxdl, does."""
    rows = []
    if bare:
        options = {"like": like, "network": bare, "sizes": sizes}
        rows.append(Competitor(BARE, "benchmarks.bare_jax:Bare", options, round_))
    if keras:
        options = {"like": like, "network": keras, "sizes": sizes}
        rows.append(Competitor(KERAS, "benchmarks.keras_models:Keras", options, round_))
    return rows


PEAK_ROW = Competitor(PEAK, "benchmarks.machine:Matmul")


def best_name(options: Mapping[str, Any]) -> str:
    """How tables call jaxdl's best form.

    Example:
      >>> best_name({"n_devices": 2, "is_mapped": True, "steps_per_call": 10})
      'jaxdl, 2 devices (shard_map), repeat(10), memory kept'
    """
    mapped = " (shard_map)" if options["is_mapped"] else ""
    repeated = "" if options["steps_per_call"] == 1 else f", repeat({options['steps_per_call']})"
    return f"jaxdl, {options['n_devices']} devices{mapped}{repeated}, memory kept"


def load_like(like: str, sizes: Mapping[str, Any]) -> JaxdlParts:
    """Weights, batches and what moves, of a workload's `Jaxdl`, given as `"module:Class"`, without its step."""
    module, _, name = like.partition(":")
    side = getattr(importlib.import_module(module), name)
    made = side.__new__(side)
    made.axis_name = None
    return made.make(**sizes)


def table(
    title: str,
    results: Sequence[Result],
    *,
    flops: float,
    aim: Aim,
    tolerance: float = TOLERANCE,
) -> Table:
    """The table of one workload.

    Args:
      title: its heading.
      results: of jaxdl's variants, named "jaxdl...", of BARE, of PEAK, and of other libraries.
      flops: operations of a step as it is written; a result whose facts say "flops" does as many as those.
      aim: floor and aim.
      tolerance: of the first losses.

    Raises:
      BenchmarkError: the competitors compute different losses.
    """
    peak, rows = next(r for r in results if r.name == PEAK), [r for r in results if r.name != PEAK]
    ours, bare = [r for r in rows if r.name.startswith(ONE)], [r for r in rows if r.name == BARE]
    difference = check_same_losses(rows, tolerance)
    best = fastest([result for result in rows if result not in ours + bare])
    made = Table(
        title, ["", "time of a step", f"speed against {best.name}", "GFLOP/s", "of the peak"], results=list(results)
    )
    done = {result.name: result.facts.get("flops", flops) for result in rows}
    made.rows = step_rows(rows, best, done, peak.median_s)
    made.notes = [
        f"Peak: {1 / peak.median_s / 1e9:.0f} GFLOP/s (XLA, float32 product of two matrices of 1536 x 1536, same "
        f"rounds). First losses agree to {difference:.0e} (allowed {tolerance:.0e}).",
        verdict(ours, best, aim),
        *(against_bare(ours, result) for result in bare),
    ]
    fewest = min((done[result.name] for result in ours), default=flops)
    if fewest < 0.98 * flops:
        made.notes.append(f"jaxdl's step takes {fewest / 1e9:.1f} G operations, and the others' {flops / 1e9:.1f} G.")
    return made


def step_rows(
    results: Sequence[Result], best: Result, flops: Mapping[str, float], peak_s: float
) -> list[Sequence[str]]:
    """Name, time, speed against the best, GFLOP/s and share of the peak of each.

    Args:
      results: the rows.
      best: what they are compared with.
      flops: by name, operations of a step.
      peak_s: seconds of one operation at the peak.
    """
    rows: list[Sequence[str]] = []
    for result in results:
        if result.failure:
            rows.append(not_run(result.name, result.failure, 5))
            continue
        rate = flops[result.name] / result.median_s
        cells = [time_cell(spread(result.seconds)), ratio_cell(speed_up(result, best))]
        rows.append([result.name, *cells, f"{rate / 1e9:.0f}", f"{100 * rate * peak_s:.0f} %"])
    return rows


def verdict(ours: Sequence[Result], best: Result, aim: Aim) -> str:
    """How the variants stand to floor and aim, in words."""
    if best.failure:
        return "Floor and aim: not judged, no other library ran."
    judged = [f"{result.name}: {judge(speed_up(result, best), aim)}" for result in ours]
    return f"Floor {aim.floor}, aim {aim.aim} times the fastest other library. {'; '.join(judged)}."


def against_bare(ours: Sequence[Result], bare: Result) -> str:
    """What jaxdl costs, or gains, over the step that was written by hand, in words."""
    ratios = [f"{result.name} {ratio_cell(speed_up(result, bare))}" for result in ours]
    return f"Speed against the step written by hand in bare JAX: {', '.join(ratios)}."
