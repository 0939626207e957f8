"""Gradual unfreezing: a run that is stopped anywhere is the run that is not, and a late group starts as a fresh one."""

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

from jaxdl import JaxdlError, LossOut, create_state, guard, make_optimizer, make_train_step
from jaxdl.checkpoint import CheckpointMismatch, Store
from jaxdl.data import ArraySource, Pipeline, eval_batches
from jaxdl.early_stopping import EarlyStopping
from jaxdl.evaluation import make_evaluator
from jaxdl.finetune.unfreeze import fit_stages, groups_of, like_at, open_stage, stage_at, staged
from jaxdl.loop import fit
from jaxdl.models import MLP
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.objectives import classification
from jaxdl.optim import dynamic_loss_scale, ema_params, learning_rate_of, loss_scale_of
from jaxdl.paths import flatten
from jaxdl.report import JsonlWriter
from jaxdl.signals import StopFlag

MODEL = MLP(widths=(8, 8, 8), n_outputs=3, dropout_rate=0.2)
TRAIN_LOSS = make_loss_fn(MODEL, classification(), inputs="image", train=True)
EVAL_LOSS = make_loss_fn(MODEL, classification(), inputs="image", train=False)
HEAD, LAST, UPPER, ALL = (
    [("head/.*", True), (".*", False)],
    [("(head|dense_2)/.*", True), (".*", False)],
    [("(head|dense_2|dense_1)/.*", True), (".*", False)],
    [(".*", True)],
)
STAGES = [(0, HEAD), (5, LAST), (11, UPPER), (16, ALL)]
STEPS = 20
SCALES = [("dense_0/.*", 0.1), ("dense_1/.*", 0.3), ("(dense_2|head)/.*", 1.0)]
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 0.05, 8, STEPS)


def rows(n, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    return ArraySource({"image": rng.normal(size=(n, 6)).astype(np.float32) + np.eye(3, 6)[label] * 3, "label": label})


def float_rows(n, seed):
    return rows(n, seed).map(lambda a: {**a, "image": a["image"].astype(np.float32)})


DATA = Pipeline(float_rows(50, 0), batch_size=8, seed=3)
EVALUATORS = {"eval": make_evaluator(EVAL_LOSS, eval_batches(float_rows(24, 9), 8))}
PARAMS, EXTRA = init_model(MODEL, jax.random.key(0), jnp.ones((1, 6)))


def optimizer(**options):
    return make_optimizer(
        "adamw", learning_rate=WARMUP, weight_decay=0.1, clip_norm=0.5, lr_scale_rules=SCALES, **options
    )


def make_step(tx, trainable):
    return guard(make_train_step(TRAIN_LOSS, tx, trainable=trainable))


class Crash(Exception):
    """A process that dies without saving."""


class At:
    """A progress display that does something once, when a step is reached."""

    def __init__(self, step=None, act=None):
        self.step, self.act, self.notes, self.is_closed = step, act, [], 0

    def update(self, step, metrics=None):
        if self.act is not None and step >= self.step and metrics is None:
            act, self.act = self.act, None
            act()

    def note(self, text):
        self.notes.append(text)

    def close(self):
        self.is_closed += 1


def die():
    raise Crash


def terminate():
    signal.raise_signal(signal.SIGTERM)


def run(folder=None, *, stages=STAGES, progress=None, tx=None, wrap=None, checkpoint_every=100, **options):
    txs = staged(tx or optimizer(), stages, PARAMS, wrap=wrap)
    state = create_state(PARAMS, EXTRA, txs[0], rng=jax.random.key(1), trainable=stages[0][1])
    fixed = {"stages": stages, "steps": STEPS, "log_every": 4, "eval_every": 6, "evaluators": EVALUATORS, **options}
    if folder is None:
        return fit_stages(state, make_step, txs, DATA, progress=progress, **fixed)
    fixed |= {"checkpoint_every": checkpoint_every, "progress": progress or At()}
    with closing(JsonlWriter(folder / "metrics.jsonl")) as writer, Store(folder / "checkpoints") as store:
        return fit_stages(state, make_step, txs, DATA, store=store, writers=[writer], **fixed)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    progress = At()
    result = run(folder, progress=progress)
    return folder, result, progress


def same(result, straight):
    chex.assert_trees_all_equal(result.state.replace(rng=0), straight.state.replace(rng=0))
    assert jax.tree.structure(result.state.opt_state) == jax.tree.structure(straight.state.opt_state)
    assert result.evaluations["eval/loss"] == straight.evaluations["eval/loss"]


def log_of(folder):
    return (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("act", [terminate, die])
def test_a_run_interrupted_at_every_boundary_and_between_equals_the_straight_one(tmp_path, straight, act):
    """A signal saves where it arrives; a crash loses what came after the last boundary, each of which was saved."""
    folder, want, _ = straight
    for at in (3, 5, 8, 11, 13, 16, 18):
        progress = At(at, act)
        if act is die:
            with pytest.raises(Crash):
                run(tmp_path, progress=progress)
            saved = max([0, *(first for first, _ in STAGES if 0 < first < at)])
        else:
            result = run(tmp_path, progress=progress)
            assert (result.stopped_by, int(result.state.step)) == ("SIGTERM", at)
            saved = at
        assert max(Store(tmp_path / "checkpoints").steps(), default=0) == saved
        assert progress.is_closed == 1
    got = run(tmp_path)
    assert got.stopped_by is None
    same(got, want)
    assert log_of(tmp_path) == log_of(folder)


def test_a_boundary_is_no_event_in_the_metric_log(straight):
    """Rows every 4 steps, evaluations every 6 and at the end; stages begin at 5, 11 and 16."""
    folder, result, progress = straight
    got = [json.loads(line) for line in log_of(folder).splitlines()]
    assert [(row["step"], "eval/loss" in row) for row in got] == [
        *[(4, False), (6, True), (8, False), (12, False), (12, True), (16, False)],
        *[(18, True), (20, False), (20, True)],
    ]
    rates = {row["step"]: row["learning_rate"] for row in got if "learning_rate" in row}
    assert rates == pytest.approx({step: float(WARMUP(step - 1)) for step in (4, 8, 12, 16, 20)}, rel=1e-6)
    assert [note for note in progress.notes if "opens" in note] == [
        f"stage {k} opens at step {first}" for k, (first, _) in enumerate(STAGES) if k
    ]
    assert progress.is_closed == 1
    assert result.timing.steps == STEPS


def test_a_run_with_one_stage_is_a_run_without_stages():
    """A second road to the same bits: the groups, the empty arrays and the driver change nothing."""
    tx = optimizer()
    state = create_state(PARAMS, EXTRA, tx, rng=jax.random.key(1))
    want = fit(state, make_step(tx, ALL), DATA, steps=6)
    got = run(stages=[(0, ALL)], steps=6, evaluators={}, eval_every=None)
    chex.assert_trees_all_close(got.state.params, want.state.params, rtol=1e-6)
    chex.assert_trees_all_close(got.state.opt_state["stage_0"], want.state.opt_state, rtol=1e-5)


def test_devices_share_the_batches_of_every_stage_and_calls_of_many_steps_stop_at_boundaries(straight):
    _, want, _ = straight
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    got = run(mesh=mesh, steps_per_call=4, evaluators={})
    chex.assert_trees_all_close(jax.device_get(got.state.params), jax.device_get(want.state.params), atol=1e-5)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(got.state))
    assert int(got.state.step) == STEPS


def test_the_best_checkpoint_of_an_earlier_stage_is_read(straight):
    folder, result, _ = straight
    txs = staged(optimizer(), STAGES, PARAMS)
    restored = Store(folder / "checkpoints").restore(like_at(result.state, txs, STAGES), step=11)
    assert (int(restored.state.step), list(restored.state.opt_state)) == (11, ["stage_0", "stage_1"])


def test_without_a_store_nothing_is_different(straight):
    _, want, _ = straight
    same(run(), want)


def test_a_checkpoint_at_a_boundary_has_the_structure_of_the_stage_that_ended(straight):
    folder, _, _ = straight
    groups = {}
    for step in Store(folder / "checkpoints").steps():
        leaves = json.loads((folder / "checkpoints" / str(step) / "manifest.json").read_text())["leaves"]
        groups[step] = sorted({path.split("/")[1] for path in leaves if path.startswith("opt_state/")})
    assert groups == {
        11: ["stage_0", "stage_1"],
        16: ["stage_0", "stage_1", "stage_2"],
        20: ["stage_0", "stage_1", "stage_2", "stage_3"],
    }


def test_frozen_leaves_have_no_state_and_do_not_move_before_their_stage(tmp_path):
    result = run(tmp_path, progress=At(5, terminate))
    moments = [path for path in flatten(result.state.opt_state) if "/mu/" in path]
    assert [path.split("/mu/")[1] for path in moments] == ["head/bias", "head/kernel"]
    assert all(leaf.size for leaf in jax.tree.leaves(result.state.opt_state))
    for path, leaf in flatten(result.state.params).items():
        is_same = np.array_equal(leaf, flatten(PARAMS)[path])
        assert is_same == (not path.startswith("head"))


def test_damaged_steps_are_passed_over_back_into_an_earlier_stage(tmp_path, straight):
    folder, want, _ = straight
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for step in (16, 20):
        path = max((tmp_path / "checkpoints" / str(step) / "ocdbt.process_0" / "d").iterdir())
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    progress = At()
    same(run(tmp_path, progress=progress), want)
    assert "resumed from the checkpoint of step 11" in progress.notes
    assert [note.split(" in ")[0] for note in progress.notes if "damaged" in note] == [
        "The checkpoint of step 20",
        "The checkpoint of step 16",
    ]
    assert log_of(tmp_path) == log_of(folder)


def test_other_stages_are_refused_on_resume(tmp_path, straight):
    folder, _, _ = straight
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointMismatch, match="opt_state/stage_1"):
        run(tmp_path, stages=[(0, LAST), (11, UPPER), (16, ALL)])


def test_a_signal_while_a_stage_opens_ends_the_run_soon(tmp_path, straight):
    """Between two calls of `fit` the outer flag listens, and the next call begins with what it has heard."""

    def make(tx, trainable):
        if trainable is LAST:
            terminate()
        return make_step(tx, trainable)

    txs = staged(optimizer(), STAGES, PARAMS)
    state = create_state(PARAMS, EXTRA, txs[0], rng=jax.random.key(1), trainable=HEAD)
    with Store(tmp_path) as store:
        result = fit_stages(state, make, txs, DATA, stages=STAGES, steps=STEPS, store=store, checkpoint_every=100)
    assert (result.stopped_by, int(result.state.step)) == ("SIGTERM", 6)
    with StopFlag() as outer, StopFlag() as inner:
        terminate()
        with StopFlag() as innermost:
            assert innermost.name == inner.name == "SIGTERM"
    assert outer.name is None


def test_early_stopping_is_counted_over_boundaries(tmp_path):
    """Evaluations at 6 (the best, in stage 1), 12 and 18: the count goes on from stage to stage and over a restart."""
    options = {"tx": make_optimizer("sgd", learning_rate=0.0), "early_stopping": EarlyStopping("eval/loss", 2)}
    run(tmp_path, progress=At(13, terminate), **options)
    result = run(tmp_path, **options)
    assert (result.stopped_by, int(result.state.step)) == ("early stopping", 18)


def test_an_evaluation_that_was_cut_short_at_a_boundary_is_made_up_for_once(tmp_path):
    stages = [(0, HEAD), (6, ALL)]
    run(tmp_path / "straight", stages=stages, steps=8)
    n_calls = []

    def evaluator(state, stop):
        n_calls.append(int(state.step))
        if len(n_calls) == 1:
            terminate()
        return EVALUATORS["eval"](state, stop)

    stopped = run(tmp_path, stages=stages, steps=8, evaluators={"eval": evaluator})
    assert (stopped.stopped_by, int(stopped.state.step)) == ("SIGTERM", 6)
    run(tmp_path, stages=stages, steps=8, evaluators={"eval": evaluator})
    assert n_calls == [6, 6, 8]
    assert log_of(tmp_path) == log_of(tmp_path / "straight")


QUADRATIC = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0, -4.0])}
ONLY_A = [("a", True), ("b", False)]
TWO = [(0, ONLY_A), (3, [(".*", True)])]


def state_of(txs):
    return create_state(QUADRATIC, {}, txs[0], rng=jax.random.key(0), trainable=ONLY_A)


def advance(state, tx, trainable, n):
    def loss_fn(params, extra, batch, rng):
        return LossOut(sum(jnp.sum(leaf**2) for leaf in params.values()), jnp.float32(1))

    step = jax.jit(make_train_step(loss_fn, tx, trainable=trainable))
    for _ in range(n):
        state, metrics = step(state, {"x": jnp.ones(1)})
    return state, metrics


def two_stages(tx, n=1, **options):
    txs = staged(tx, TWO, QUADRATIC, **options)
    state, _ = advance(state_of(txs), txs[0], ONLY_A, 3)
    opened = open_stage(state, txs[1], trainable=TWO[1][1])
    return (opened, *advance(opened, txs[1], TWO[1][1], n))


def test_the_first_update_of_a_late_group_is_that_of_a_fresh_adam():
    """Adam's first step is the rate times the sign of the gradient, whatever its size; the rate is that of the run."""
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    opened, after, metrics = two_stages(make_optimizer("adam", learning_rate=schedule, eps=0.0))
    np.testing.assert_allclose(after.params["b"], QUADRATIC["b"] - 0.07 * np.sign(QUADRATIC["b"]), rtol=1e-6)
    assert float(metrics["learning_rate"]) == pytest.approx(0.07)
    assert [int(s.n_updates) for s in after.opt_state.values()] == [4, 4]
    assert [int(optax.tree.get(s, "count")) for s in after.opt_state.values()] == [4, 1]
    assert learning_rate_of(opened.opt_state) == learning_rate_of({"stage_0": opened.opt_state["stage_1"]})


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(optax.linear_schedule(0.1, 0.0, 10), eps=0.0),
        optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 10), eps=0.0),
    ],
)
def test_the_schedules_of_optax_run_on_too(tx):
    _, after, _ = two_stages(tx)
    np.testing.assert_allclose(after.params["b"], QUADRATIC["b"] - 0.07 * np.sign(QUADRATIC["b"]), rtol=1e-6)


def test_opening_changes_nothing_but_the_new_state():
    txs = staged(make_optimizer("adamw", learning_rate=0.1), TWO, QUADRATIC)
    state, _ = advance(state_of(txs), txs[0], ONLY_A, 3)
    opened = open_stage(state, txs[1], trainable=TWO[1][1])
    chex.assert_trees_all_equal(opened.opt_state["stage_0"], state.opt_state["stage_0"])
    assert (opened.params, opened.step) == (state.params, state.step)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((opened.params, opened.opt_state))]
    assert len(set(buffers)) == len(buffers), "two leaves share memory: donating the state would fail"


def test_clipping_is_by_the_norm_over_all_open_groups():
    """Gradients 2w: SGD with rate 1 and clip_norm 1 moves by the unit vector, whose parts are those of all groups."""
    sgd = make_optimizer("sgd", learning_rate=1.0, clip_norm=1.0)
    chain = {"wrap": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx)}
    for tx, options in ((sgd, {}), (optax.sgd(1.0), chain)):
        opened, after, _ = two_stages(tx, **options)
        moved = np.concatenate([opened.params[name] - after.params[name] for name in "ab"])
        want = np.concatenate([opened.params[name] for name in "ab"])
        np.testing.assert_allclose(moved, want / np.linalg.norm(want), rtol=1e-5)


def test_entries_are_clipped_before_the_norm_is_taken():
    opened, after, _ = two_stages(make_optimizer("sgd", learning_rate=1.0, clip_norm=0.7, clip_value=0.5))
    want = np.clip(np.concatenate([2 * opened.params[name] for name in "ab"]), -0.5, 0.5)
    moved = np.concatenate([opened.params[name] - after.params[name] for name in "ab"])
    np.testing.assert_allclose(moved, 0.7 * want / np.linalg.norm(want), rtol=1e-5)


def test_the_loss_scale_stands_around_all_groups():
    with pytest.raises(JaxdlError, match="wrap=dynamic_loss_scale"):
        staged(dynamic_loss_scale(optax.sgd(0.1)), TWO, QUADRATIC)
    _, after, _ = two_stages(optax.sgd(0.1), n=2, wrap=dynamic_loss_scale)
    assert int(after.opt_state.good_steps) == 5
    assert loss_scale_of(after.opt_state) == 2**15


def test_averages_of_late_leaves_begin_when_they_open():
    """Two updates of `b`, with decay 0.5: weights 1/3 and 2/3; those of `a` are averaged over five."""
    tx = make_optimizer("sgd", learning_rate=0.25, ema_decay=0.5)  # w is halved by every update
    opened, after, _ = two_stages(tx, n=2)
    b = np.asarray(QUADRATIC["b"])
    np.testing.assert_allclose(ema_params(opened.opt_state, opened.params)["b"], b)
    np.testing.assert_allclose(ema_params(after.opt_state, after.params)["b"], (b / 2 + 2 * b / 4) / 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "lamb", "lars", "muon", "schedule_free_adamw", "rmsprop", "lion"])
def test_every_optimizer_takes_groups(name):
    """The group that opened first moves as it does alone: the empty arrays of the others change nothing."""
    tx = make_optimizer(name, learning_rate=0.1)
    txs = staged(tx, TWO, QUADRATIC)
    got, _ = advance(state_of(txs), txs[0], ONLY_A, 2)
    want, _ = advance(create_state({"a": QUADRATIC["a"]}, {}, tx, rng=jax.random.key(0)), tx, [(".*", True)], 2)
    np.testing.assert_allclose(got.params["a"], want.params["a"], rtol=1e-6)
    open_stage(got, txs[1], trainable=TWO[1][1])


def test_what_keeps_a_state_for_leaves_may_not_stand_outside():
    txs = staged(optax.sgd(0.1), TWO, QUADRATIC, wrap=lambda tx: optax.chain(optax.trace(0.9), tx))
    with pytest.raises(JaxdlError, match="wrap= keeps a state for leaves"):
        open_stage(state_of(txs), txs[1], trainable=TWO[1][1])
    plain = create_state(QUADRATIC, {}, optax.sgd(0.1), rng=jax.random.key(0))
    with pytest.raises(JaxdlError, match="that `staged` made"):
        open_stage(plain, optax.sgd(0.1), trainable=TWO[1][1])


def test_the_optimizer_of_another_stage_is_named():
    txs = staged(optax.sgd(0.1), TWO, QUADRATIC)
    with pytest.raises(JaxdlError, match=r"stage 1 was given the leaves \['a'\].*trainable=stages\[1\]\[1\]"):
        txs[1].init({"a": QUADRATIC["a"], "b": None})


def test_all_problems_of_stages_at_once():
    stages = [(0, HEAD), (5, [("haed/.*", True), (".*", False)]), (9, [("dense_2/.*", True), (".*", False)])]
    with pytest.raises(JaxdlError) as error:
        groups_of(stages, PARAMS)
    text = str(error.value)
    assert text.startswith("stages: 2 problem(s)")
    assert "rule 'haed/.*' matches nothing; nearest paths: head/bias" in text
    assert "stage 2 freezes head/bias, head/kernel again; stages only open" in text
    with pytest.raises(JaxdlError, match="stage 1 opens nothing that stage 0 does not train"):
        staged(optax.sgd(0.1), [(0, HEAD), (5, HEAD)], PARAMS)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "must be a list of pairs"),
        ([(0, HEAD, 1)], "must be a list of pairs"),
        ([(1, HEAD)], "stage 0 begins at step 1; it must begin at 0"),
        ([(0.0, HEAD)], r"stages begin at \[0.0\]"),
        ([(0, HEAD), (0, ALL)], "stage 1 begins at step 0, stage 0 at 0"),
    ],
)
def test_wrong_steps_are_refused(stages, message):
    with pytest.raises(JaxdlError, match=message):
        stage_at(stages, 3)
    with pytest.raises(JaxdlError, match=message):
        groups_of(stages, PARAMS)


def test_stages_that_the_run_never_reaches_are_refused():
    with pytest.raises(JaxdlError, match="stage 3 begins at step 16, but the run ends at steps=16"):
        run(steps=16)
    with pytest.raises(JaxdlError, match="1 optimizers for 4 stages"):
        fit_stages(None, make_step, [None], DATA, stages=STAGES, steps=20)
    with pytest.raises(JaxdlError, match="step=-1"):
        stage_at(STAGES, -1)
