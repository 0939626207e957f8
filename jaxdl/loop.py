"""The training loop: the only place with side effects over time."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdl import metrics as metrics_lib
from jaxdl import nonfinite, zero_gradient
from jaxdl.compilation import Compiled
from jaxdl.early_stopping import EarlyStopping, Patience
from jaxdl.errors import JaxdlError
from jaxdl.evaluation import Evaluator
from jaxdl.feed import Feed, make_feed
from jaxdl.fit_checks import check_fit, mesh_problems, virtual_shard_problems
from jaxdl.fit_output import Output, headline
from jaxdl.losses import LossFn
from jaxdl.parallel import processes, watchdog
from jaxdl.parallel.exact import ExactStep, replica
from jaxdl.parallel.mesh import put
from jaxdl.parallel.presets import REPLICATED
from jaxdl.parallel.sharding import state_shardings
from jaxdl.paths import Rules
from jaxdl.signals import StopFlag
from jaxdl.state import TrainState
from jaxdl.step import Step
from jaxdl.steplog import NonFiniteStep, StepLog
from jaxdl.tracing import Profile, Tracer


@dataclass
class Timing:
    """Where the wall-clock time of this process went, in seconds; `steps` were made by this process."""

    compile_s: float = 0.0
    is_cached: bool = False
    first_step_s: float = 0.0
    train_s: float = 0.0
    eval_s: float = 0.0
    save_s: float = 0.0
    steps: int = 0
    examples_per_s: float = 0.0


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: the state after the last update.
      stopped_by: None at the planned end, else `"SIGTERM"`, `"SIGINT"` or `"early stopping"`.
      evaluations: the last evaluation in full, arrays such as the confusion matrix included.
      timing: seconds by phase.
      metadata: what a checkpoint of `state` holds beside it: the unfinished row of the log, the patience.
    """

    state: TrainState
    stopped_by: str | None
    evaluations: dict[str, Any]
    timing: Timing
    metadata: dict[str, Any]


def fit(
    state: TrainState,
    train_step: Step,
    data: Any,
    *,
    steps: int,
    loss_fn: LossFn | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
    eval_every: int | None = None,
    store: Any = None,
    checkpoint_every: int | None = None,
    writers: Iterable[Any] = (),
    log_every: int = 50,
    progress: Any = None,
    early_stopping: EarlyStopping | None = None,
    steps_per_call: int = 1,
    is_resident: bool | None = None,
    mesh: jax.sharding.Mesh | None = None,
    sharding: Rules = REPLICATED,
    exact_shards: int | None = None,
    profile: Profile | None = None,
    stop_at: int | None = None,
    resumed: Any = None,
) -> FitResult:
    """Trains until `steps` updates have been made, going on from the newest good checkpoint in `store`.

    The loop never waits for the device except to evaluate and to save: metrics are fetched one interval late. SIGTERM
    and Ctrl-C save and return, in every phase; a signal to one of many processes stops all at the same step.

    Args:
      state: the state to start from; its buffers are donated.
      train_step: a pure step; it is compiled here, once. Wrapped in `guard` it never applies a non-finite update.
      data: random access to batches, `data[step]`, with `rows(step)`, `n_rows` and `batch_size`.
      steps: updates in the whole run, earlier processes included.
      loss_fn: the loss of `train_step`; with it a non-finite value is traced to leaves and rows.
      evaluators: by name; `eval/accuracy` is the accuracy of the evaluator `eval`.
      eval_every: updates between evaluations; None evaluates at the end only.
      store: a `checkpoint.Store`; None keeps nothing.
      checkpoint_every: updates between checkpoints; None saves at the end and on a signal only.
      writers: `report.writers` that get a row every `log_every` updates and one for each evaluation.
      log_every: updates in a row of the metric log.
      progress: a `report.progress.Progress`.
      early_stopping: when to stop before the end.
      steps_per_call: updates in one call of the device, see `step.repeat`; at most `eval_every` and `checkpoint_every`.
      is_resident: keep the dataset on the device and gather rows there; None does so when it is small and no
        transform runs on the host.
      mesh: devices over whose axis `data` batches are sharded; None uses one device.
      sharding: rules over the paths of the state: where it lies on the mesh, see `parallel.state_shardings`.
      exact_shards: exact mode, the same bits on any number of devices: each step is computed in so many virtual
        shards, see `parallel.exact_step`, and each process evaluates on one device. None is the fast mode.
      profile: a trace to take.
      stop_at: save and return after this many updates of the `steps`, in the middle of the run: without an evaluation
        that is not due, and with the row of the log open. `resumed` takes the result on.
      resumed: a `checkpoint.Restored` to go on from, in place of `state` and of what `store` holds.

    Raises:
      JaxdlError: arguments that make no sense, all at once.
      ShardingError: the state does not fit the mesh.
      NonFiniteError: a guarded step met a NaN or an infinity; the state before it has been saved.
      ZeroGradientError: the gradient of the run's first step is exactly zero, so nothing would train.
      RetraceError: a batch changed its shape or dtype.
    """
    shardings = None if mesh is None else state_shardings(sharding, state, mesh)
    problems = (
        mesh_problems(mesh, shardings, data)
        if exact_shards is None
        else virtual_shard_problems(exact_shards, train_step, mesh, data, steps_per_call, is_resident)
    )
    counts = {
        "steps": steps,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "steps_per_call": steps_per_call,
        "stop_at": stop_at,
    }
    check_fit(counts, problems)
    feed = make_feed(
        train_step,
        data,
        steps_per_call=steps_per_call,
        is_resident=is_resident,
        mesh=mesh,
        shardings=shardings,
        exact_shards=exact_shards,
    )
    state = state if resumed is None else resumed.state
    output = Output(list(writers), progress, data.batch_size / data.n_rows)
    loop = Loop(
        state=state if mesh is None else jax.tree.map(put, state, shardings),
        feed=feed,
        data=data,
        steps=steps,
        loss_fn=loss_fn,
        evaluators=dict(evaluators or {}),
        eval_every=eval_every or steps,
        store=store,
        checkpoint_every=checkpoint_every or steps,
        output=output,
        log=StepLog(log_every, feed.packing),
        trainable=getattr(train_step, "trainable", None),
        patience=Patience(early_stopping),
        is_exact=exact_shards is not None,
        tracer=Tracer(profile, output.note),
        stop_at=steps if stop_at is None else min(stop_at, steps),
        resumed=resumed,
    )
    take = _taken.get()
    with StopFlag() as stop:
        return loop.run(stop) if take is None else take(loop, stop)


_taken: ContextVar[Callable[["Loop", StopFlag], FitResult] | None] = ContextVar("taken", default=None)


@contextlib.contextmanager
def intercepted(take: Callable[["Loop", StopFlag], FitResult]) -> Iterator[None]:
    """Inside, `fit` hands the loop that it has made to `take(loop, stop)` instead of running it."""
    token = _taken.set(take)
    try:
        yield
    finally:
        _taken.reset(token)


@dataclass
class Loop:
    """A run under way; `run` goes on to its end."""

    state: TrainState
    feed: Feed
    data: Any
    steps: int
    loss_fn: LossFn | None
    evaluators: dict[str, Evaluator]
    eval_every: int
    store: Any
    checkpoint_every: int
    output: Output
    log: StepLog
    trainable: Rules | None
    patience: Patience
    is_exact: bool
    tracer: Tracer
    stop_at: int
    resumed: Any
    timing: Timing = field(default_factory=Timing)
    evaluations: dict[str, Any] = field(default_factory=dict)
    saved_step: int = -1
    evaluated_step: int = -1

    def run(self, stop: StopFlag) -> FitResult:
        step = first = self._resume()
        start = time.perf_counter()
        stopped_by = None
        try:
            self.feed.start(step, self.stop_at)
            stopped_by = self._catch_up(step, stop)
            while step < self.stop_at and not stopped_by:
                n = self.feed.chunk(self._boundary(step) - step)
                watchdog.enter(f"step {step + 1}")
                self.tracer.at(step - first, self.state)
                self.state, vectors = self.feed.call(self.state, step, n)
                if step == first:
                    self._first_step(self.feed.program(n), start)
                if step == 0:
                    self._check_gradient(vectors)
                self.log.push(step, vectors)
                step += n
                stopped_by = self._after(step, n, stop) or stop.name
            stopped_by = self._finish(step, stopped_by, stop)
        except NonFiniteStep as bad:
            self._fail(bad)
        except JaxdlError as error:
            error.exit_code = 1
            raise
        finally:
            self._close()
        self._time(step - first, time.perf_counter() - start)
        return FitResult(self.state, stopped_by, self.evaluations, self.timing, self._metadata(step))

    def _resume(self) -> int:
        watchdog.enter("the search for a checkpoint")
        if self.store is not None:
            processes.agree("the newest checkpoint", max(self.store.steps(), default=None), "all must see one folder.")
        if self.resumed is None and (self.store is None or not self.store.steps()):
            for step, reason in ({} if self.store is None else self.store.damaged()).items():
                self.output.note(f"checkpoint {step} is not whole ({reason}); starting from the beginning")
            self.output.resume(0)
            return int(self.state.step)
        restored = self.resumed or self.store.restore(self.state, on_note=self.output.note)
        step, saved = restored.step, restored.metadata
        self.log.from_json(saved.get("log"))
        self.patience.from_json(saved.get("patience"))
        self.saved_step = step
        self.evaluated_step = step if saved.get("is_evaluated") else -1
        self.output.resume(step)
        if self.resumed is None:
            self.state = restored.state
            self.output.note(f"resumed from the checkpoint of step {step}")
        return step

    def _catch_up(self, step: int, stop: StopFlag) -> str | None:
        """What the process before left undone at the step it saved: an evaluation cut off by a signal, or stopping."""
        is_owed = step % self.eval_every == 0 and self.evaluated_step != step
        is_resumed = self.saved_step == step and 0 < step < self.steps
        return self._evaluate(step, stop) if is_resumed and (is_owed or self.patience.is_spent) else None

    def _boundary(self, step: int) -> int:
        return min([self.stop_at, *((step // n + 1) * n for n in (self.eval_every, self.checkpoint_every))])

    def _first_step(self, compiled: Compiled | ExactStep, start: float) -> None:
        jax.block_until_ready(self.state.step)
        self.timing.first_step_s = time.perf_counter() - start
        self.timing.compile_s, self.timing.is_cached = compiled.compile_s or 0.0, compiled.is_cached
        source = "read from the compile cache" if compiled.is_cached else "compiled"
        self.output.note(f"{self.feed.description}; step {source} in {self.timing.compile_s:.1f} s")

    def _check_gradient(self, vectors: jax.Array) -> None:
        """Of the very first step of the run, which has ended."""
        metrics = self.feed.packing.unpack(np.atleast_2d(np.asarray(vectors))[0])
        if zero_gradient.is_zero(metrics):
            raise zero_gradient.explain(metrics, self.state, self.loss_fn, self.data[0], self.trainable)

    def _after(self, step: int, n: int, stop: StopFlag) -> str | None:
        self.output.progress_to(step)
        if step // self.log.every > (step - n) // self.log.every:
            self.output.write(self.log.drain(before=step - self.log.every))
        stopped_by = None
        if step % self.eval_every == 0 and step < self.steps:
            stopped_by = self._evaluate(step, stop)
        if step % self.checkpoint_every == 0 and step < self.steps:
            self._save(step)
        elif self.store is not None:
            self.store.check()
        return stopped_by

    def _finish(self, step: int, stopped_by: str | None, stop: StopFlag) -> str | None:
        self.output.write(self.log.drain())
        is_end = self.stop_at == self.steps
        if stopped_by is None and is_end:
            stopped_by = self._evaluate(step, stop)
        if stopped_by == "early stopping" or (stopped_by is None and is_end):
            self.output.write(self.log.close_row(step))
        if self.store is not None:
            if self.saved_step != step:
                self._save(step)
            self._timed("save_s", self.store.wait)
        return stopped_by

    def _evaluate(self, step: int, stop: StopFlag) -> str | None:
        self.output.write(self.log.drain())
        watchdog.enter(f"the evaluation after step {step}")
        start, found = time.perf_counter(), {}
        state = replica(self.state) if self.is_exact else self.state
        for name, evaluator in self.evaluators.items():
            result = evaluator(state, stop)
            if result is None:
                return stop.name
            found.update({f"{name}/{key}": value for key, value in result.items()})
        self.timing.eval_s += time.perf_counter() - start
        self.evaluations, self.evaluated_step = found, step
        self.output.emit(step, metrics_lib.scalars(found))
        self.output.note(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in headline(found).items()))
        return "early stopping" if self.patience.is_over(found) and step < self.steps else None

    def _save(self, step: int) -> None:
        if self.store is None:
            return
        self.output.write(self.log.drain())
        watchdog.enter(f"the save of step {step}")
        metadata = self._metadata(step)
        scores = metrics_lib.scalars(self.evaluations) if metadata["is_evaluated"] else None
        self._timed("save_s", lambda: self.store.save(step, self.state, metadata=metadata, metrics=scores))
        self.saved_step = step

    def _metadata(self, step: int) -> dict[str, Any]:
        is_evaluated = self.evaluated_step == step
        return {"log": self.log.to_json(), "patience": self.patience.to_json(), "is_evaluated": is_evaluated}

    def _fail(self, bad: NonFiniteStep) -> None:
        what = f"step {bad.step} gave non-finite {', '.join(bad.names)}"
        if not nonfinite.is_held(self.state):
            raise nonfinite.NonFiniteError(
                f"{what}; the step is not guarded, so the parameters are lost from there on. Start again from the last "
                "checkpoint with guard(step)."
            )
        held, self.state = self.state, nonfinite.release(self.state)
        if self.store is not None and self.saved_step != bad.step:
            self._save(bad.step)
            self.store.wait()
        if self.loss_fn is not None:
            nonfinite.check(held, self.loss_fn, self.data[bad.step], self.data.rows(bad.step))
        raise nonfinite.NonFiniteError(f"{what}; the state before it is kept.")

    def _timed(self, name: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        setattr(self.timing, name, getattr(self.timing, name) + time.perf_counter() - start)

    def _time(self, n_steps: int, seconds: float) -> None:
        timing = self.timing
        timing.steps = n_steps
        timing.train_s = max(seconds - timing.first_step_s - timing.eval_s - timing.save_s, 1e-9)
        timing.examples_per_s = max(n_steps - 1, 0) * self.data.batch_size / timing.train_s

    def _close(self) -> None:
        self.tracer.stop(self.state)
        self.feed.close()
        self.output.close()
