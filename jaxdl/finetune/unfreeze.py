"""Gradual unfreezing: what trains is a function of the step, and a run that was stopped anywhere goes on exactly.

Source: Howard and Ruder, "Universal language model fine-tuning for text classification", ACL 2018, section 3.3.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdl.checkpoint import Restored
from jaxdl.errors import JaxdlError
from jaxdl.finetune.staged import Stages, Tx, groups_of, open_stage, staged, step_problems
from jaxdl.loop import FitResult, Profile, Timing, fit
from jaxdl.paths import Rules
from jaxdl.signals import StopFlag
from jaxdl.state import TrainState, split_trainable
from jaxdl.step import Step

__all__ = ["Stages", "fit_stages", "groups_of", "like_at", "open_stage", "stage_at", "staged"]


def stage_at(stages: Stages, step: int) -> int:
    """The number of the stage that makes the update after `step` updates.

    Args:
      stages: `[(first step, trainable rules), ...]`.
      step: updates made, >= 0.

    Raises:
      JaxdlError: the steps of the stages do not begin at 0 or do not increase, or `step` is negative.

    Example:
      >>> stages = [(0, [("head/.*", True), (".*", False)]), (100, [(".*", True)])]
      >>> [stage_at(stages, step) for step in (0, 99, 100, 5000)]
      [0, 0, 1, 1]
    """
    problems = step_problems(stages) + ([f"step={step} must not be negative."] if step < 0 else [])
    if problems:
        raise JaxdlError.listing("stages", problems)
    return max(k for k, (first, _) in enumerate(stages) if first <= step)


def fit_stages(
    state: TrainState,
    make_step: Callable[[Tx, Rules], Step],
    txs: Sequence[Tx],
    data: Any,
    *,
    stages: Stages,
    steps: int,
    store: Any = None,
    progress: Any = None,
    profile: Profile | None = None,
    **options: Any,
) -> FitResult:
    """Trains stage after stage with `loop.fit`, going on from the newest good checkpoint in `store`.

    A boundary is no event in the metric log: rows and evaluations come where a run without stages has them. It is one
    in the store: each stage ends with a checkpoint. A checkpoint of a boundary has the structure of the stage that
    ended there.

    Args:
      state: the first state of stage 0, made with `txs[0]` and its rules; its buffers are donated.
      make_step: `(tx, trainable) -> step`, called once for each stage, such as
        `lambda tx, trainable: guard(make_train_step(loss_fn, tx, trainable=trainable))`.
      txs: the optimizer of each stage, from `staged`.
      data, steps, store, progress: as for `fit`; `steps` are those of the whole run.
      stages: `[(first step, trainable rules), ...]`.
      profile: a trace of the first stage of this process.
      **options: the others of `fit`.

    Returns:
      As `fit`; the timing is the sum over the stages of this process.

    Raises:
      JaxdlError: the stages and `txs` do not belong together, or a stage begins at the end of the run or later.
      Exception: whatever `fit` raises.

    Example: see `tests/test_unfreeze.py`.
    """
    _check(stages, txs, steps)
    shown = None if progress is None else _LeftOpen(progress)
    try:
        with StopFlag() as stop:
            return _run(state, make_step, txs, data, stages, steps, store, shown, profile, stop, options)
    finally:
        if progress is not None:
            progress.close()


def _check(stages: Stages, txs: Sequence[Tx], steps: int) -> None:
    problems = step_problems(stages)
    if not problems and len(txs) != len(stages):
        problems.append(f"there are {len(txs)} optimizers for {len(stages)} stages; make them with staged().")
    late = [] if problems else [(k, first) for k, (first, _) in enumerate(stages) if first >= steps]
    problems += [f"stage {k} begins at step {first}, but the run ends at steps={steps}; drop it." for k, first in late]
    if problems:
        raise JaxdlError.listing("fit_stages", problems)


def _run(
    state: TrainState,
    make_step: Callable[[Tx, Rules], Step],
    txs: Sequence[Tx],
    data: Any,
    stages: Stages,
    steps: int,
    store: Any,
    progress: "_LeftOpen | None",
    profile: Profile | None,
    stop: StopFlag,
    options: dict[str, Any],
) -> FitResult:
    note = (lambda text: None) if progress is None else progress.note
    resumed = None
    if store is not None and store.steps():
        resumed = store.restore(like_at(state, txs, stages), on_note=note)
        note(f"resumed from the checkpoint of step {resumed.step}")
    k = _stage_of(stages, int(state.step) if resumed is None else resumed.step)
    timing: Timing | None = None
    evaluations: dict[str, Any] = {}
    while True:
        _, trainable = stages[k]
        end = stages[k + 1][0] if k + 1 < len(stages) else steps
        result = fit(
            state,
            make_step(txs[k], trainable),
            data,
            steps=steps,
            stop_at=end,
            resumed=resumed,
            store=store,
            progress=progress,
            profile=profile,
            **options,
        )
        timing = result.timing if timing is None else _added(timing, result.timing)
        profile = None
        evaluations = result.evaluations or evaluations
        stopped_by = result.stopped_by or (stop.name if end < steps else None)
        if stopped_by or end == steps:
            return result._replace(stopped_by=stopped_by, evaluations=evaluations, timing=timing)
        k += 1
        state = open_stage(result.state, txs[k], trainable=stages[k][1])
        resumed = Restored(state, end, result.metadata, ())
        note(f"stage {k} opens at step {end}")


def _stage_of(stages: Stages, step: int) -> int:
    """The stage that made a state: at a boundary that is the one that ended there."""
    return stage_at(stages, max(step - 1, 0))


def like_at(state: TrainState, txs: Sequence[Tx], stages: Stages) -> Callable[[int], TrainState]:
    """What a checkpoint of a step holds, for `store.restore(like_at(state, txs, stages), step=store.best_step())`.

    Args:
      state: a state of any stage.
      txs: the optimizer of each stage, from `staged`.
      stages: `[(first step, trainable rules), ...]`.

    Returns:
      `step -> state`, whose optimizer state is abstract and everything else that of `state`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxdl import create_state
      >>> stages = [(0, [("head", True), (".*", False)]), (100, [(".*", True)])]
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> txs = staged(optax.sgd(0.1, 0.9), stages, params)
      >>> state = create_state(params, {}, txs[0], rng=jax.random.key(0), trainable=stages[0][1])
      >>> [list(like_at(state, txs, stages)(step).opt_state) for step in (100, 101)]
      [['stage_0'], ['stage_0', 'stage_1']]
    """

    def like(step: int) -> TrainState:
        k = _stage_of(stages, step)
        moving, _ = split_trainable(state.params, stages[k][1])
        return state.replace(opt_state=jax.eval_shape(txs[k].init, moving))

    return like


def _added(a: Timing, b: Timing) -> Timing:
    """The sum of two times; the rate is over the steps of both, and the programs are cached if all are."""
    total = {field.name: getattr(a, field.name) + getattr(b, field.name) for field in dataclasses.fields(Timing)}
    examples = a.examples_per_s * a.train_s + b.examples_per_s * b.train_s
    is_cached = a.is_cached and (b.is_cached or b.steps == 0)
    return Timing(**total | {"is_cached": is_cached, "examples_per_s": examples / max(total["train_s"], 1e-9)})


class _LeftOpen:
    """A progress display that the end of a stage does not close."""

    def __init__(self, progress: Any) -> None:
        self.update, self.note = progress.update, progress.note

    def close(self) -> None:
        """Nothing: the run goes on."""
