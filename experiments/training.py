"""What every supervised experiment does between its data and its report: build the pieces and call `fit`."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments import settings
from experiments.finetuning import Tuning
from jaxdl import TrainState, create_state, guard, make_train_step
from jaxdl.config import Parsed, leaf_values
from jaxdl.data import Pipeline, eval_batches
from jaxdl.evaluation import make_evaluator
from jaxdl.finetune.contract import Frozen
from jaxdl.finetune.delta import DeltaStore, save_delta
from jaxdl.finetune.statistics import freeze_statistics
from jaxdl.finetune.unfreeze import Stages, fit_stages, staged
from jaxdl.loop import FitResult
from jaxdl.losses import LossFn
from jaxdl.models.apply import init_model, select_inputs, threefry_by_kernel
from jaxdl.optim import eval_params
from jaxdl.parallel import is_first, state_shardings
from jaxdl.parallel.exact import exact_problems
from jaxdl.parallel.rows import local
from jaxdl.paths import Rules
from jaxdl.report import RunReport, diagnose, parameter_table, read_history
from jaxdl.run import Run, parameter_rows
from jaxdl.step import Step


@dataclass(frozen=True)
class Supervised:
    """The sections and fields that supervised experiments share."""

    optimizer: settings.Optimizer = field(default_factory=settings.Optimizer)
    loop: settings.Loop = field(default_factory=settings.Loop)
    hardware: settings.Hardware = field(default_factory=settings.Hardware)
    parallel: settings.Parallel = field(default_factory=settings.Parallel)
    trainable: tuple[tuple[str, bool], ...] = ((".*", True),)  # (regex, moves) pairs over parameter paths
    seed: int = 0  # of the initial parameters, the order of rows, dropout and augmentation
    out: str = "runs/experiment"  # the run folder; an existing one is continued

    def shared_problems(self, batch_size: int, validation: float) -> list[str]:
        problems = []
        if self.seed < 0:
            problems.append(f"seed={self.seed} must not be negative.")
        parts = self.hardware.microbatches
        if parts > 0 and batch_size % parts:
            problems.append(f"data.batch_size={batch_size} does not divide into hardware.microbatches={parts}.")
        if self.parallel.exact and not [*self.parallel.problems()]:
            problems += exact_problems(self.parallel.virtual_shards, 1, {"data.batch_size": batch_size}, max(parts, 1))
            if self.loop.steps_per_call > 1:
                problems.append("loop.steps_per_call must be 1 with parallel.exact, whose step is several programs.")
        if not validation and self.loop.early_stopping_patience is not None:
            problems.append("loop.early_stopping_patience needs data.validation > 0; test rows must not stop a run.")
        return problems


@dataclass(frozen=True)
class Task:
    """A supervised task.

    Attributes:
      model: called as `model(inputs, train=...)`.
      inputs: the key or keys of the batch that the model takes, as for `make_loss_fn`.
      train: pipeline of training batches.
      evaluated: name -> source of rows, `test` and, where one was held out, `validation`.
      train_loss_fn, eval_loss_fn: as for `make_train_step`; the second has dropout off and may tell more metrics.
      best_metric, best_mode: the validation metric that the best checkpoint is chosen by.
      eval_batch_size: rows of an evaluation batch.
      params, extra: what to start from; drawn from the seed where None.
      tuning: what of a pretrained model moves; its checkpoints hold only that. None: all that `config.trainable` says.
    """

    model: nn.Module
    inputs: str | Sequence[str]
    train: Pipeline
    evaluated: Mapping[str, Any]
    train_loss_fn: LossFn
    eval_loss_fn: LossFn
    best_metric: str
    best_mode: str
    eval_batch_size: int
    params: Any = None
    extra: Any = None
    tuning: Tuning | None = None


def train(parsed: Parsed, task: Task) -> tuple[FitResult, RunReport] | None:
    """Trains, and gathers what every report shows; None where a signal ended the run early."""
    config, start = parsed.config, time.perf_counter()
    length, eval_every, checkpoint_every, warmup = (
        duration.to_steps(task.train.batch_size, task.train.n_rows)
        for duration in (
            config.loop.length,
            config.loop.eval_every,
            config.loop.checkpoint_every,
            config.optimizer.warmup,
        )
    )
    stages, optimizer = _rules(config, task.tuning)
    trainable = stages[-1][1]
    tx = config.hardware.scaled(optimizer.build(steps=length, warmup_steps=warmup))
    params, extra = (task.params, task.extra or {}) if task.params is not None else _shapes(task, config.seed)
    rows = _show_parameters(optimizer, params, trainable)
    frozen = None if task.tuning is None else Frozen(params, extra, trainable)
    txs = [tx] if len(stages) == 1 else staged(tx, stages, params)

    def make_step(tx: Any, trainable: Rules) -> Step:
        loss_fn = freeze_statistics(task.train_loss_fn, trainable)
        step = make_train_step(loss_fn, tx, trainable=trainable, microbatches=config.hardware.microbatches)
        return guard(step, config.loop.guard)

    mesh = config.parallel.make_mesh()
    state = _first_state(config, task, txs[0], stages[0][1], mesh)
    with _open_run(parsed, task, length) as run:
        result = fit_stages(
            state,
            make_step,
            txs,
            task.train,
            stages=stages,
            steps=length,
            loss_fn=task.train_loss_fn,
            evaluators={
                name: make_evaluator(task.eval_loss_fn, eval_batches(source, task.eval_batch_size))
                for name, source in task.evaluated.items()
            },
            eval_every=eval_every,
            store=run.store if frozen is None else DeltaStore(run.store, frozen),
            checkpoint_every=checkpoint_every,
            writers=run.writers,
            log_every=config.loop.log_every,
            progress=run.progress,
            early_stopping=config.loop.early_stopping("validation/loss"),
            steps_per_call=config.loop.steps_per_call,
            mesh=mesh,
            sharding=config.parallel.rules(state),
            exact_shards=config.parallel.exact_shards,
            profile=config.loop.profile_in(run.directory),
        )
        if result.stopped_by in ("SIGTERM", "SIGINT"):
            print(f"stopped by {result.stopped_by}; saved in {config.out}. Run the same command to go on.")
            return None
        result = result._replace(state=local(result.state))  # each process looks at the result by itself
        if frozen is not None:
            _seal(run.directory, frozen, result.state)
        return result, _report(parsed, task, run, result, rows, time.perf_counter() - start)


def _seal(folder: Path, frozen: Frozen, state: TrainState) -> None:
    """States that nothing else moved, and writes what did."""
    params = eval_params(state.opt_state, state.params)
    if frozen.hashes:
        print(frozen.check(params, state.extra))
    if not is_first():
        return
    shutil.rmtree(folder / "delta", ignore_errors=True)
    save_delta(folder / "delta", params, state.extra, frozen)
    print(f"delta         {folder / 'delta'}, for jaxdl.finetune.delta.load_delta")


def _init(task: Task, seed: int) -> tuple[Any, Any]:
    first, others = select_inputs(jax.tree.map(lambda x: x[:1], task.train[0]), task.inputs)
    return init_model(task.model, jax.random.key(seed), first, **others)


def _shapes(task: Task, seed: int) -> tuple[Any, Any]:
    shapes: tuple[Any, Any] = jax.eval_shape(lambda: _init(task, seed))
    return shapes


def _first_state(config: Any, task: Task, tx: Any, trainable: Rules, mesh: jax.sharding.Mesh | None) -> TrainState:
    """The state before the first update; what is drawn from the seed is drawn where it will lie."""

    def make() -> TrainState:
        params, extra = (task.params, task.extra or {}) if task.params is not None else _init(task, config.seed)
        return create_state(params, extra, tx, rng=jax.random.key(config.seed + 1), trainable=trainable)

    if mesh is None or task.params is not None or config.parallel.exact:
        return make()
    shapes = jax.eval_shape(make)
    shardings = state_shardings(config.parallel.rules(shapes), shapes, mesh)
    is_whole = all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
    with threefry_by_kernel() if is_whole else contextlib.nullcontext():
        drawn: TrainState = jax.jit(make, out_shardings=shardings)()
    return drawn


def _rules(config: Any, tuning: Tuning | None) -> tuple[Stages, settings.Optimizer]:
    if tuning is None:
        return [(0, config.trainable)], config.optimizer
    if tuning.lr_scale_rules is None:
        return tuning.stages, config.optimizer
    rules = tuple(tuning.lr_scale_rules)
    return tuning.stages, dataclasses.replace(config.optimizer, lr_scale_rules=rules)


def _show_parameters(optimizer: settings.Optimizer, params: Any, trainable: Rules) -> list[dict[str, Any]]:
    rows = parameter_rows(
        params,
        trainable=trainable,
        weight_decay_rules=optimizer.weight_decay_rules,
        lr_scale_rules=optimizer.lr_scale_rules,
    )
    print(parameter_table(rows), flush=True)
    return rows


def _open_run(parsed: Parsed, task: Task, length: int) -> Run:
    loop = parsed.config.loop
    return Run(
        parsed.config.out,
        parsed.config,
        total_steps=length,
        batch_size=task.train.batch_size,
        allow=parsed.allow,
        keep_last=loop.keep_last,
        keep_best=loop.keep_best,
        best_metric=task.best_metric if "validation" in task.evaluated else None,
        best_mode=task.best_mode,
    )


def _report(
    parsed: Parsed, task: Task, run: Run, result: FitResult, rows: list[dict[str, Any]], seconds: float
) -> RunReport:
    history, rate = read_history(run.directory / "metrics.jsonl"), result.timing.examples_per_s
    metric = task.best_metric.removeprefix("validation/")
    return RunReport(
        title=Path(parsed.config.out).name,
        summary=f"{type(task.model).__name__}, {task.train.n_rows:,} training rows, batches of {task.train.batch_size}",
        steps=int(result.state.step),
        seconds=seconds,
        steps_per_second=rate / task.train.batch_size or None,
        examples_per_second=rate or None,
        diagnosis=diagnose(
            history,
            metric=None if metric == "loss" else metric,
            higher_is_better=task.best_mode == "max",
            train="train",
            evaluation="validation" if "validation" in task.evaluated else "test",
        ),
        history=[{name: row[name] for name in row if _is_curve(name)} for row in history],
        parameters=rows,
        config=leaf_values(parsed.config),
        config_sources=parsed.sources,
        environment=run.environment,
        checkpoints=[{"step": step, "folder": f"checkpoints/{step}"} for step in run.store.steps()],
    )


def _is_curve(name: str) -> bool:
    """Not the epoch, and no part of a composite metric such as `test/confusion/recall`."""
    return name != "epoch" and name.count("/") < 2


def predict(task: Task, result: FitResult) -> np.ndarray:
    """The model's outputs for the test rows, in their order."""
    state = result.state
    variables = {"params": eval_params(state.opt_state, state.params), **state.extra}
    apply = jax.jit(lambda variables, first, others: task.model.apply(variables, first, **others))
    batches = eval_batches(task.evaluated["test"], task.eval_batch_size)
    outputs = [np.asarray(apply(variables, *select_inputs(batch, task.inputs))) for batch in batches]
    return np.concatenate(outputs)[: len(task.evaluated["test"])]
