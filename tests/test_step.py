"""The step and its transformations, by closed forms and by second roads to the same number."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdl
from jaxdl import JaxdlError, LossOut, create_state, guard, losses, make_eval_step, make_train_step, metrics, repeat
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.nonfinite import NonFiniteError, check, is_held, release
from jaxdl.objectives import classification
from jaxdl.paths import RuleError
from jaxdl.step import on_rows

pytestmark = pytest.mark.optimized


class Net(nn.Module):
    """A network with dropout and batch statistics."""

    dropout_rate: float = 0.0
    has_norm: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8, name="body")(x)
        if self.has_norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train, name="dropout")(nn.relu(x))
        return nn.Dense(3, name="head")(x)


def batch_of(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(n, 5)).astype(np.float32),
        "label": rng.integers(0, 3, n).astype(np.int32),
        "weight": rng.integers(0, 4, n).astype(np.float32),
    }


def setup(tx=None, trainable=((".*", True),), **fields):
    model, tx = Net(**fields), tx or optax.adamw(0.01)
    params, extra = init_model(model, jax.random.key(0), jnp.ones((1, 5)))
    loss_fn = make_loss_fn(model, classification(), inputs="image", train=True)
    return loss_fn, tx, create_state(params, extra, tx, rng=jax.random.key(1), trainable=trainable)


def run(step, state, n=3):
    for i in range(n):
        state, out = step(state, batch_of(seed=i))
    return state, out


def test_gradient_is_the_weighted_mean_of_the_rows():
    def loss_fn(params, extra, batch, rng):
        return LossOut(*losses.squared_error(params["w"] * batch["x"], batch["y"], batch["weight"]))

    state = create_state({"w": jnp.float32(0.0)}, {}, optax.sgd(1.0), rng=jax.random.key(0))
    x, y, weight = np.array([1.0, 2.0, 5.0]), np.array([1.0, 1.0, 1.0]), np.array([1.0, 3.0, 0.0])
    batch = {"x": jnp.float32(x), "y": jnp.float32(y), "weight": jnp.float32(weight)}
    after, out = make_train_step(loss_fn, optax.sgd(1.0))(state, batch)
    assert float(after.params["w"]) == (weight * 2 * x * y).sum() / weight.sum()
    assert metrics.finish(out)["loss"] == 1.0
    assert int(after.step) == 1


@pytest.mark.parametrize("microbatches", [1, 2, 3, 12])
def test_jit_equals_repeat_equals_microbatched(microbatches):
    loss_fn, tx, state = setup()
    want, want_out = run(jax.jit(make_train_step(loss_fn, tx)), state)
    step = make_train_step(loss_fn, tx, microbatches=microbatches)
    got, got_out = run(jax.jit(step), state)
    chex.assert_trees_all_close(got.params, want.params, atol=1e-6)
    chex.assert_trees_all_close(got_out, want_out, rtol=1e-5)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(batch_of(seed=i) for i in range(3)))
    repeated, outs = jax.jit(repeat(step, 3))(state, stacked)
    chex.assert_trees_all_close(repeated.params, want.params, atol=1e-6)
    assert outs["loss"].total.shape == (3,)


def test_rows_gathered_on_the_device_equal_host_batches():
    loss_fn, tx, state = setup()
    step, data, rows = make_train_step(loss_fn, tx), batch_of(40), np.array([3, 1, 39, 3])
    want, _ = jax.jit(step)(state, {key: value[rows] for key, value in data.items()})
    got, _ = jax.jit(lambda s, d, r: on_rows(step, d)(s, r))(state, data, rows)
    chex.assert_trees_all_equal(got.params, want.params)


@pytest.mark.parametrize("mapped", ["pmap", "shard_map"])
def test_a_mapped_axis_gives_the_same_update(mapped):
    loss_fn, tx, state = setup()
    want, want_out = jax.jit(make_train_step(loss_fn, tx))(state, batch_of(16))
    step = make_train_step(loss_fn, tx, axis_name="data")
    if mapped == "pmap":
        parts = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch_of(16))
        got, out = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None)(state, parts)
    else:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
        specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P()}
        got, out = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))(state, batch_of(16))
    chex.assert_trees_all_close(got.params, want.params, atol=1e-6)
    assert metrics.finish(jax.device_get(out))["loss"] == pytest.approx(metrics.finish(want_out)["loss"], rel=1e-6)


def test_one_trace_over_three_batches():
    loss_fn, tx, state = setup(dropout_rate=0.1, has_norm=True)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_train_step(loss_fn, tx), n=1), donate_argnums=0)
    run(step, state)


def test_frozen_leaves_do_not_move_and_have_no_moments():
    trainable = [("head/.*", True), (".*", False)]
    loss_fn, tx, state = setup(optax.adamw(0.1, weight_decay=0.5), trainable)
    before = jax.device_get(state.params)
    after, out = run(jax.jit(make_train_step(loss_fn, tx, trainable=trainable)), state)
    chex.assert_trees_all_equal(after.params["body"], before["body"])
    assert np.abs(after.params["head"]["kernel"] - before["head"]["kernel"]).max() > 0.01
    assert sorted(jaxdl.paths.flatten(state.opt_state[0].mu)) == ["head/bias", "head/kernel"]
    assert float(out["grad_norm"]) > 0


def test_the_gradient_norm_is_of_the_trainable_leaves_only():
    trainable = [("head/bias", True), (".*", False)]
    loss_fn, tx, state = setup(optax.sgd(0.0), trainable)
    batch = batch_of()
    _, out = make_train_step(loss_fn, tx, trainable=trainable)(state, batch)

    def of_bias(bias):
        params = {**state.params, "head": {**state.params["head"], "bias": bias}}
        total, weight, *_ = loss_fn(params, {}, batch, jax.random.key(0))
        return total / weight

    want = jnp.linalg.norm(jax.grad(of_bias)(state.params["head"]["bias"]))
    np.testing.assert_allclose(out["grad_norm"], want, rtol=1e-6)


def test_dropout_differs_by_step_and_is_a_function_of_the_seed():
    loss_fn, tx, state = setup(optax.sgd(0.0), dropout_rate=0.5)
    step = jax.jit(make_train_step(loss_fn, tx))
    first, out_0 = step(state, batch_of())
    _, out_1 = step(first, batch_of())
    _, again = step(state, batch_of())
    assert float(out_0["loss"].total) != float(out_1["loss"].total)
    assert float(out_0["loss"].total) == float(again["loss"].total)


def test_batch_statistics_are_updated():
    loss_fn, tx, state = setup(has_norm=True)
    after, _ = jax.jit(make_train_step(loss_fn, tx))(state, batch_of())
    x = batch_of()["image"] @ np.asarray(state.params["body"]["kernel"])
    np.testing.assert_allclose(after.extra["batch_stats"]["norm"]["mean"], 0.01 * x.mean(0), atol=1e-6)


def test_a_batch_of_padding_changes_nothing():
    loss_fn, tx, state = setup(optax.sgd(1.0))
    batch = {**batch_of(), "weight": np.zeros(12, np.float32)}
    after, _ = make_train_step(loss_fn, tx)(state, batch)
    chex.assert_trees_all_equal(after.params, state.params)


def test_the_logged_rate_is_the_applied_one():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = jaxdl.make_optimizer("sgd", learning_rate=schedule)
    state = create_state({"w": jnp.float32(0.0)}, {}, tx, rng=jax.random.key(0))
    step = jax.jit(make_train_step(lambda p, *_: LossOut(p["w"], jnp.float32(1)), tx))
    for expected in (1.0, 0.75, 0.5, 0.25, 0.0):
        before = float(state.params["w"])
        state, out = step(state, {"x": jnp.ones(1)})
        assert before - float(state.params["w"]) == pytest.approx(float(out["learning_rate"]), abs=1e-6)
        assert float(out["learning_rate"]) == expected


def test_fp16_overflow_is_skipped_and_training_goes_on():
    loss_fn, _, _ = setup()
    tx = jaxdl.optim.dynamic_loss_scale(optax.sgd(0.1), initial=2.0**40, growth_interval=4)
    _, _, state = setup(tx)
    step = jax.jit(guard(make_train_step(losses.with_compute_dtype(loss_fn, jnp.float16), tx)))
    scales, values = [], []
    for _ in range(60):
        state, out = step(state, batch_of())
        scales.append(float(out["loss_scale"]))
        values.append(metrics.finish(out)["loss"])
    assert not is_held(state)
    assert scales[0] == 2.0**39
    assert min(scales) < 2.0**30
    assert values[-1] < 0.8 * values[0]


def bad_batch(row=4):
    batch = batch_of()
    batch["image"][row] = np.inf
    batch["weight"][:] = 1.0
    return batch


def test_guard_stop_holds_the_state_and_says_where():
    loss_fn, tx, state = setup()
    step = jax.jit(guard(make_train_step(loss_fn, tx)))
    good, _ = run(step, state, 2)
    held, _ = step(good, bad_batch())
    later, _ = run(step, held, 2)
    assert is_held(later)
    chex.assert_trees_all_equal(release(later).params, good.params)
    chex.assert_trees_all_equal(release(later).opt_state, good.opt_state)
    with pytest.raises(NonFiniteError) as caught:
        check(later, loss_fn, bad_batch(), rows=np.arange(100, 112))
    text = str(caught.value)
    assert "step 2 produced a non-finite value" in text
    assert "batch['image'] is non-finite in rows 104" in text
    assert "the loss is non-finite for rows 104" in text
    assert "gradients are non-finite at body/kernel, head/bias, head/kernel" in text
    check(good, loss_fn, batch_of())


def test_guard_skip_leaves_the_update_out():
    loss_fn, tx, state = setup()
    step = jax.jit(guard(make_train_step(loss_fn, tx), "skip"))
    good, out = step(state, batch_of())
    assert metrics.finish(out)["skipped"] == 0.0
    after, out = step(good, bad_batch())
    chex.assert_trees_all_equal(after.params, good.params)
    chex.assert_trees_all_equal(after.opt_state, good.opt_state)
    assert int(after.step) == 2
    assert metrics.finish(out)["skipped"] == 1.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_a_guarded_step_equals_a_bare_one_on_good_batches():
    loss_fn, tx, state = setup(dropout_rate=0.2)
    step = make_train_step(loss_fn, tx)
    guarded, bare = run(jax.jit(guard(step)), state)[0], run(jax.jit(step), state)[0]
    chex.assert_trees_all_close(guarded.params, bare.params, atol=1e-6)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_guarded_update_is_in_place(policy):
    loss_fn, tx, state = setup()
    step = make_train_step(loss_fn, tx)
    compiled = jax.jit(guard(step, policy), donate_argnums=0).lower(state, batch_of()).compile().as_text()
    moment = r" copy\(%state_opt_state\S*kernel"
    assert re.search(r"parameter\(\d+\).*opt_state.*kernel", compiled)  # it would be found by this name
    assert not re.search(moment, compiled)

    def chosen_afterwards(state, batch):
        return guard(lambda *given: step(*given), policy)(state, batch)

    assert re.search(moment, jax.jit(chosen_afterwards, donate_argnums=0).lower(state, batch_of()).compile().as_text())


def test_guard_does_not_go_round_a_wrapper_that_copied_the_attributes_of_a_step():
    loss_fn, tx, state = setup()
    step = make_train_step(loss_fn, tx)

    @functools.wraps(step)
    def doubled(state, batch):
        return step(step(state, batch)[0], batch)

    after = jax.jit(guard(doubled))(state, batch_of())[0]
    assert int(after.step) == 2
    chex.assert_trees_all_close(after.params, jax.jit(doubled)(state, batch_of())[0].params, atol=1e-6)


def test_eval_sums_over_padded_batches_equal_the_whole():
    model = Net()
    loss_fn = make_loss_fn(model, classification(is_detailed=True), inputs="image", train=False)
    _, _, state = setup()
    step, data = jax.jit(make_eval_step(loss_fn)), batch_of(10)
    whole = metrics.finish(step(state, data))
    total = {}
    for cut in (slice(0, 4), slice(4, 8), slice(8, 10)):
        part = {key: value[cut] for key, value in data.items()}
        n = len(part["label"])
        part = {
            key: np.concatenate([value, np.zeros((4 - n, *value.shape[1:]), value.dtype)])
            for key, value in part.items()
        }
        total = metrics.add(total, step(state, part))
    parts = metrics.finish(total)
    for name in ("loss", "accuracy", "confusion/f1", "calibration/ece"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_train_step(None, optax.sgd(0.1), microbatches=0), "microbatches=0 must be at least 1"),
        (lambda: repeat(None, 0), "repeat n=0 must be at least 1"),
        (lambda: guard(None, "sometimes"), "policy='sometimes' must be 'stop' or 'skip'"),
        (
            lambda: create_state({"w": jnp.ones(1)}, {}, optax.sgd(0.1), rng=jax.random.PRNGKey(0)),
            "must be one typed key",
        ),
        (lambda: setup(trainable=[(".*", False)]), "freeze every parameter"),
        (lambda: setup(trainable=[(".*", 1)]), "each must be True or False"),
        (lambda: setup(trainable=[("haed/.*", True), (".*", False)]), "nearest paths: head/bias, head/kernel"),
        (lambda: create_state({"n": jnp.ones(1, int)}, {}, optax.sgd(0.1), rng=jax.random.key(0)), "not floating"),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises((JaxdlError, RuleError), match=message):
        call()


def test_a_batch_that_does_not_divide_is_refused():
    loss_fn, tx, state = setup()
    with pytest.raises(JaxdlError, match="12 rows does not divide into microbatches=5"):
        jax.jit(make_train_step(loss_fn, tx, microbatches=5))(state, batch_of())
    with pytest.raises(JaxdlError, match="needs leaves with a first axis of 5"):
        jax.jit(repeat(make_train_step(loss_fn, tx), 5))(state, batch_of())


def test_donating_the_state_spares_the_callers_arrays():
    loss_fn, tx, _ = setup()
    params, _ = init_model(Net(), jax.random.key(0), jnp.ones((1, 5)))
    rng = jax.random.key(1)
    state = create_state(params, {}, tx, rng=rng)
    jax.jit(make_train_step(loss_fn, tx), donate_argnums=0)(state, batch_of())
    chex.assert_tree_all_finite(params)
    assert jax.random.bits(rng) == jax.random.bits(jax.random.key(1))


def test_the_loss_scale_does_not_depend_on_the_batch_size():
    loss_fn, _, _ = setup()
    tx = jaxdl.optim.dynamic_loss_scale(optax.sgd(0.1))
    _, _, state = setup(tx)
    half = losses.with_compute_dtype(loss_fn, jnp.float16)
    want, _ = jax.jit(make_train_step(loss_fn, optax.sgd(0.1)))(setup(optax.sgd(0.1))[2], batch_of(600))
    for microbatches in (1, 3):
        after, out = jax.jit(make_train_step(half, tx, microbatches=microbatches))(state, batch_of(600))
        assert float(out["loss_scale"]) == 2.0**15
        chex.assert_trees_all_close(after.params, want.params, atol=2e-3)


def test_the_norm_of_float16_gradients_does_not_overflow_by_their_sum():
    """A hundred rows of gradient 10: their sum is 1000, whose square float16 does not hold."""

    def loss_fn(params, extra, batch, rng):
        return LossOut(jnp.sum(batch["x"] * params["w"]).astype(jnp.float32), jnp.float32(100))

    tx = optax.sgd(0.1)
    state = create_state({"w": jnp.ones((), jnp.float16)}, {}, tx, rng=jax.random.key(0))
    _, metrics = make_train_step(loss_fn, tx)(state, {"x": jnp.full(100, 10.0, jnp.float16)})
    assert float(metrics["grad_norm"]) == pytest.approx(10.0)
