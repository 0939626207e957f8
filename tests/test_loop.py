"""The loop: the same numbers by every road, stopping and going on, and what it refuses."""

import json
import shutil
import signal
from contextlib import closing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, create_state, guard, make_optimizer, make_train_step, metrics
from jaxdl.checkpoint import Restored, Store
from jaxdl.compilation import Compiled, RetraceError
from jaxdl.data import ArraySource, Pipeline, eval_batches, random_flip
from jaxdl.early_stopping import EarlyStopping
from jaxdl.evaluation import evaluate, make_evaluator
from jaxdl.loop import Profile, fit
from jaxdl.models import MLP
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.nonfinite import NonFiniteError
from jaxdl.objectives import classification
from jaxdl.report import JsonlWriter, read_history
from jaxdl.signals import StopFlag
from jaxdl.steplog import NonFiniteStep, Packing, StepLog

MODEL = MLP(widths=(16,), n_outputs=3, dropout_rate=0.2)
TRAIN_LOSS = make_loss_fn(MODEL, classification(), inputs="image", train=True)
EVAL_LOSS = make_loss_fn(MODEL, classification(), inputs="image", train=False)


def rows(n=50, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    return ArraySource(
        {"image": rng.normal(size=(n, 6)).astype(np.float32) + np.eye(3, 6)[label] * 3, "label": label}
    ).map(lambda a: {**a, "image": a["image"].astype(np.float32)})


def pieces(tx=None, **options):
    tx = tx or make_optimizer("adamw", learning_rate=0.01, weight_decay=0.1)
    params, extra = init_model(MODEL, jax.random.key(0), jnp.ones((1, 6)))
    state = create_state(params, extra, tx, rng=jax.random.key(1))
    return state, guard(make_train_step(TRAIN_LOSS, tx)), Pipeline(rows(), batch_size=8, seed=3, **options)


def run(folder=None, *, steps=20, data=None, tx=None, **options):
    state, step, pipeline = pieces(tx)
    if folder is None:
        return fit(state, step, data or pipeline, steps=steps, log_every=4, loss_fn=TRAIN_LOSS, **options)
    with closing(JsonlWriter(folder / "metrics.jsonl")) as writer, Store(folder / "checkpoints") as store:
        options = {
            "eval_every": 6,
            "checkpoint_every": 5,
            "evaluators": {"eval": make_evaluator(EVAL_LOSS, VALIDATION)},
        } | options
        return fit(
            state,
            step,
            data or pipeline,
            steps=steps,
            log_every=4,
            loss_fn=TRAIN_LOSS,
            store=store,
            writers=[writer],
            **options,
        )


VALIDATION = eval_batches(rows(30, seed=9), 8)


def log_of(folder):
    return (folder / "metrics.jsonl").read_text()


def test_every_way_of_feeding_gives_the_same_numbers():
    want = run(is_resident=False)
    for options in (
        {"is_resident": True},
        {"is_resident": True, "steps_per_call": 3},
        {"is_resident": False, "steps_per_call": 4},
    ):
        got = run(**options)
        chex.assert_trees_all_close(got.state.params, want.state.params, atol=1e-6)
        assert int(got.state.step) == 20


def test_devices_share_a_batch():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    want = run(is_resident=False)
    for options in ({}, {"is_resident": True}, {"steps_per_call": 3}):
        got = run(mesh=mesh, evaluators={"eval": make_evaluator(EVAL_LOSS, VALIDATION)}, **options)
        chex.assert_trees_all_close(jax.device_get(got.state.params), jax.device_get(want.state.params), atol=1e-6)
        assert len(got.state.step.sharding.device_set) == 4
        assert np.isfinite(got.evaluations["eval/loss"])


def test_the_log_is_one_row_an_interval_and_one_an_evaluation(tmp_path):
    run(tmp_path, steps=14)
    got = [json.loads(line) for line in log_of(tmp_path).splitlines()]
    assert [(row["step"], "train/loss" in row, "eval/loss" in row) for row in got] == [
        (4, True, False),
        (6, False, True),
        (8, True, False),
        (12, True, False),
        (12, False, True),
        (14, False, True),
        (14, True, False),
    ]
    assert got[0]["epoch"] == 4 * 8 / 50
    assert got[0]["learning_rate"] == pytest.approx(0.01)


class SignalAt:
    """Raises a signal when a batch is read, in an evaluation, or in a save."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("phase", ["read", "evaluate", "save", "first"])
def test_a_signal_saves_and_a_restart_ends_with_the_same_bits(tmp_path, phase, monkeypatch):
    straight = run(tmp_path / "straight")
    now = SignalAt({"read": 9, "evaluate": 2, "save": 2, "first": 1}[phase])
    evaluator = make_evaluator(EVAL_LOSS, VALIDATION)

    def signalled_evaluator(state, stop):
        if phase == "evaluate":
            now()
        return evaluator(state, stop)

    save = Store.save

    def signalled_save(self, *args, **options):
        if phase == "save":
            now()
        return save(self, *args, **options)

    monkeypatch.setattr(Store, "save", signalled_save)
    state, step, data = pieces()
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with Store(tmp_path / "checkpoints") as store:

        class Progress:
            def update(self, n, values=None):
                if phase in ("read", "first") and values is None:
                    now()

            def note(self, text): ...

            def close(self): ...

        result = fit(
            state,
            step,
            data,
            steps=20,
            log_every=4,
            store=store,
            writers=[writer],
            eval_every=6,
            checkpoint_every=5,
            evaluators={"eval": signalled_evaluator},
            progress=Progress(),
        )
    writer.close()
    assert result.stopped_by == "SIGTERM"
    at = int(result.state.step)
    assert 0 < at < 20
    assert at == max(Store(tmp_path / "checkpoints").steps())
    monkeypatch.undo()
    final = run(tmp_path)
    assert final.stopped_by is None
    chex.assert_trees_all_equal(final.state.params, straight.state.params)
    chex.assert_trees_all_equal(final.state.opt_state, straight.state.opt_state)
    if phase != "evaluate":  # an evaluation that was cut short is made at the end only
        assert log_of(tmp_path) == log_of(tmp_path / "straight")


def test_a_restart_drops_rows_beyond_its_checkpoint(tmp_path):
    run(tmp_path / "straight")
    run(tmp_path, steps=13)
    with Store(tmp_path / "checkpoints") as store:
        assert store.steps() == [5, 10, 13]
    shutil.rmtree(tmp_path / "checkpoints" / "13")
    run(tmp_path)
    assert log_of(tmp_path) == log_of(tmp_path / "straight")


def test_a_finished_run_is_evaluated_again_and_not_trained(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path)
    chex.assert_trees_all_equal(first.state.params, again.state.params)
    assert again.timing.steps == 0
    assert again.evaluations["eval/loss"] == first.evaluations["eval/loss"]


def test_early_stopping_and_the_best_checkpoint(tmp_path):
    tx = optax.sgd(0.0)
    rule = EarlyStopping("eval/loss", patience=2)
    result = run(tmp_path, tx=tx, steps=100, early_stopping=rule)
    assert result.stopped_by == "early stopping"
    assert int(result.state.step) == 18  # evaluations at 6 (the best), 12 and 18
    with pytest.raises(JaxdlError, match=r"'eval/los', which no evaluator gives; there are: .*eval/loss"):
        run(tmp_path / "b", early_stopping=EarlyStopping("eval/los", patience=2))


def test_early_stopping_survives_a_restart(tmp_path):
    rule = EarlyStopping("eval/loss", patience=3)
    run(tmp_path, tx=optax.sgd(0.0), steps=12, early_stopping=rule)
    result = run(tmp_path, tx=optax.sgd(0.0), steps=100, early_stopping=rule)
    assert int(result.state.step) == 24


def test_evaluation_uses_the_averaged_parameters():
    tx = make_optimizer("sgd", learning_rate=0.5, ema_decay=0.9)
    result = run(tx=tx, evaluators={"eval": make_evaluator(EVAL_LOSS, VALIDATION)})
    plain = evaluate(EVAL_LOSS, result.state.replace(opt_state=()), VALIDATION)
    assert result.evaluations["eval/loss"] != plain["loss"]


class Poisoned(Pipeline):
    """NaN in one row of one batch."""

    def __getitem__(self, step):
        batch = super().__getitem__(step)
        if step == 10:
            batch["image"][3] = np.nan
        return batch


def test_a_nan_stops_the_run_with_leaf_step_and_row_and_keeps_the_state_before(tmp_path):
    straight = run(steps=10)
    data = Poisoned(rows(), batch_size=8, seed=3, transforms=(lambda example, rng: example,))
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, data=data, eval_every=100)
    text, row = str(caught.value), data.rows(10)[3]
    assert "step 10 produced a non-finite value" in text
    assert f"batch['image'] is non-finite in rows {row}\n" in text
    assert caught.value.exit_code == 1
    state, *_ = pieces()
    with Store(tmp_path / "checkpoints") as store:
        restored = store.restore(state)
    assert restored.step == 10
    chex.assert_trees_all_equal(restored.state.params, straight.state.params)


def test_an_unguarded_step_says_so():
    state, _, _ = pieces()
    data = Poisoned(rows(), batch_size=8, seed=3, transforms=(lambda example, rng: example,))
    step = make_train_step(TRAIN_LOSS, make_optimizer("adamw", learning_rate=0.01))
    state = create_state(state.params, {}, make_optimizer("adamw", learning_rate=0.01), rng=jax.random.key(0))
    with pytest.raises(NonFiniteError, match=r"step 10 gave non-finite .*; the step is not guarded"):
        fit(state, step, data, steps=20, log_every=4)


def test_a_retrace_is_an_error_that_names_the_leaf():
    class Ragged(Pipeline):
        def __getitem__(self, step):
            batch = super().__getitem__(step)
            return batch if step < 3 else {**batch, "image": batch["image"][:, :5]}

    data = Ragged(rows(), batch_size=8, transforms=(lambda example, rng: example,))
    with pytest.raises(RetraceError, match=r"argument 1/image was float32\[8,6\] and is now float32\[8,5\]"):
        run(data=data)


def test_a_compiled_function_names_every_change():
    fn = Compiled(lambda tree: tree, name="fn")
    fn({"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(RetraceError) as caught:
        fn({"a": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2)})
    for line in (
        "argument 0/b (float32[2]) is missing now",
        "argument 0/c (float32[2]) is new",
        "argument 0/a was float32[2] and is now bfloat16[2]",
    ):
        assert line in str(caught.value)


def test_a_transform_keeps_the_data_on_the_host():
    state, step, _ = pieces()
    data = Pipeline(rows(), batch_size=8, transforms=(random_flip(),))
    with pytest.raises(JaxdlError, match="is_resident=True needs a source of arrays and no transforms"):
        fit(state, step, data, steps=2, is_resident=True)


def test_all_bad_arguments_at_once():
    state, step, data = pieces()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("data",))
    with pytest.raises(JaxdlError) as caught:
        fit(state, step, data, steps=0, log_every=0, mesh=mesh)
    assert "3 problem(s)" in str(caught.value)
    assert "batch_size=8 does not divide over 3 devices on axis 'data'" in str(caught.value)
    with pytest.raises(JaxdlError, match=r"patience=0.*\n.*min_delta=-1"):
        EarlyStopping("eval/loss", patience=0, min_delta=-1.0)


def test_the_log_does_not_depend_on_the_steps_of_a_call(tmp_path):
    for n in (1, 6):
        run(tmp_path / str(n), steps_per_call=n, is_resident=True, eval_every=6, checkpoint_every=12, steps=30)
    rows = [read_history(tmp_path / str(n) / "metrics.jsonl") for n in (1, 6)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row["step"] for row in rows[0] if "train/loss" in row] == [4, 8, 12, 16, 20, 24, 28, 30]
    np.testing.assert_allclose(
        *([row["train/loss"] for row in each if "train/loss" in row] for each in rows), rtol=1e-5
    )
    with pytest.raises(JaxdlError, match="steps_per_call=7 is more than eval_every=6; use at most 6"):
        run(steps_per_call=7, eval_every=6)


def test_a_profile_is_written(tmp_path):
    run(profile=Profile(tmp_path / "trace", start=2, n_steps=2))
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def vector(packing, loss, rate):
    return packing.pack({"loss": metrics.Mean(jnp.float32(loss), jnp.float32(1)), "rate": jnp.float32(rate)})


def finished(rows):
    return [(step, metrics.scalars(metrics.finish(sums))) for step, sums in rows]


def test_a_profile_covers_calls_of_many_steps_and_short_runs(tmp_path):
    run(profile=Profile(tmp_path / "many", start=2, n_steps=2), steps_per_call=4)
    run(profile=Profile(tmp_path / "short", start=18, n_steps=50))
    for name in ("many", "short"):
        assert list((tmp_path / name).rglob("*.xplane.pb")), name


def test_the_compile_time_is_that_of_the_program_that_ran():
    assert run(steps_per_call=4, is_resident=True).timing.compile_s > 0


def test_a_checkpoint_saved_by_hand_can_be_continued(tmp_path):
    state, _, _ = pieces()
    with Store(tmp_path / "checkpoints") as store:
        store.save(0, state)
    assert int(run(tmp_path).state.step) == 20


@pytest.mark.parametrize("stop_at", [6, 7, 10])
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, stop_at):
    """6 is due for an evaluation and 10 for a save; 7 lies inside a row of the log."""
    straight = run(tmp_path / "straight")
    first = run(tmp_path, stop_at=stop_at)
    assert (int(first.state.step), first.stopped_by) == (stop_at, None)
    assert max(Store(tmp_path / "checkpoints").steps()) == stop_at
    second = run(tmp_path, resumed=Restored(first.state, stop_at, first.metadata, ()))
    chex.assert_trees_all_equal(second.state.params, straight.state.params)
    chex.assert_trees_all_equal(second.state.opt_state, straight.state.opt_state)
    assert log_of(tmp_path) == log_of(tmp_path / "straight")


def test_the_log_fetches_only_what_is_older_than_asked():
    packing = Packing()
    log = StepLog(every=2, packing=packing)
    for step in range(4):
        log.push(step, vector(packing, step, step))
    assert finished(log.drain(before=2)) == [(2, {"loss": 0.5, "rate": 1.0})]
    assert log.drain(before=2) == []
    log.push(4, vector(packing, 4, 4))
    assert [step for step, _ in log.drain()] == [4]
    saved, other = json.loads(json.dumps(log.to_json())), StepLog(every=2, packing=packing)
    other.from_json(saved)
    for each in (log, other):
        each.push(5, vector(packing, 6, 5))
    assert finished(log.drain()) == finished(other.drain()) == [(6, {"loss": 5.0, "rate": 5.0})]


def test_the_log_takes_many_steps_at_once():
    packing = Packing()
    log = StepLog(every=3, packing=packing)
    log.push(0, jnp.stack([vector(packing, i, i) for i in range(7)]))
    assert finished(log.drain()) == [(3, {"loss": 1.0, "rate": 2.0}), (6, {"loss": 4.0, "rate": 5.0})]
    assert finished(log.close_row(7)) == [(7, {"loss": 6.0, "rate": 6.0})]
    assert log.close_row(7) == []


def test_the_log_stops_at_the_first_non_finite_step():
    packing = Packing()
    log = StepLog(every=10, packing=packing)
    for step, value in enumerate([1.0, np.inf, np.nan]):
        log.push(step, vector(packing, value, 0.5))
    with pytest.raises(NonFiniteStep, match=r"step 1: \['loss'\]"):
        log.drain()
    assert log.to_json() == [1.0, 1.0, 0.5]


def test_packing_keeps_composite_metrics():
    packing = Packing()
    given = {"z": jnp.float32(3), "confusion": metrics.confusion(jnp.eye(3), jnp.array([0, 1, 1])), "a": jnp.float32(1)}
    back = packing.unpack(np.asarray(packing.pack(given)))
    chex.assert_trees_all_equal(back, jax.device_get(given))
    assert packing.is_summed.tolist() == [False] + [True] * 9 + [False]


def test_the_flag_gives_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
