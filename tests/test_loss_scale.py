"""Dynamic loss scaling against a Python model of its rules; a skipped update must leave no trace."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.errors import JaxdlError
from jaxdl.optim import dynamic_loss_scale, learning_rate_of, loss_scale_of, make_optimizer

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
GOOD = jax.tree.map(lambda w: w + 1.0, PARAMS)


def bad_grads(value):
    return {**GOOD, "bias": GOOD["bias"].at[1].set(value)}


def python_model(outcomes, *, scale, factor, growth_interval, minimum):
    good_steps, path = 0, []
    for is_good in outcomes:
        good_steps = good_steps + 1 if is_good else 0
        if not is_good:
            scale = max(scale / factor, minimum)
        elif good_steps == growth_interval:
            scale, good_steps = scale * factor, 0
        path.append((scale, good_steps))
    return path


@given(st.lists(st.booleans(), max_size=15), st.integers(1, 4), st.sampled_from([2.0, 4.0]))
@settings(max_examples=25, deadline=None)
def test_the_scale_follows_its_rules(outcomes, growth_interval, factor):
    keywords = {"factor": factor, "growth_interval": growth_interval, "minimum": 2.0}
    tx = dynamic_loss_scale(optax.sgd(1.0), initial=16.0, **keywords)
    opt_state, path = tx.init(jnp.ones(1)), []
    for is_good in outcomes:
        _, opt_state = tx.update(jnp.full(1, 1.0 if is_good else jnp.inf), opt_state)
        path.append((float(loss_scale_of(opt_state)), int(opt_state.good_steps)))
    assert path == python_model(outcomes, scale=16.0, **keywords)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", jnp.inf),
        ("adamw", jnp.nan),
        ("lars", -jnp.inf),
        ("muon", jnp.nan),
        ("schedule_free_adamw", jnp.inf),
    ],
)
def test_a_skipped_update_leaves_no_trace(name, value):
    """No moment, count, schedule or rate changes, and training goes on as if the step had not been."""
    average = {} if name.startswith("schedule_free") else {"ema_decay": 0.9}
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = dynamic_loss_scale(make_optimizer(name, learning_rate=schedule, clip_norm=1.0, **average))
    update = jax.jit(tx.update)
    _, before = update(GOOD, tx.init(PARAMS), PARAMS)
    updates, after = update(bad_grads(value), before, PARAMS)
    chex.assert_trees_all_equal(after.inner, before.inner)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert float(learning_rate_of(after)) == float(learning_rate_of(before))
    assert float(loss_scale_of(after)) == float(loss_scale_of(before)) / 2
    chex.assert_trees_all_equal(update(GOOD, after, PARAMS)[0], update(GOOD, before, PARAMS)[0])


def test_a_skipped_update_does_not_reach_the_plateau():
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = dynamic_loss_scale(make_optimizer("gd", learning_rate=0.1, plateau=plateau))
    opt_state = tx.init(PARAMS)
    _, after = tx.update(bad_grads(jnp.nan), opt_state, PARAMS, value=jnp.nan)
    chex.assert_trees_all_equal(after.inner, opt_state.inner)


@pytest.mark.parametrize("name", ["momentum", "adamw", "rmsprop", "lamb", "adafactor", "schedule_free_adamw"])
def test_good_updates_are_those_of_the_inner_optimizer(name):
    inner = make_optimizer(name, learning_rate=0.1)
    tx = dynamic_loss_scale(inner)
    scaled, opt_state = jax.jit(tx.update)(GOOD, tx.init(PARAMS), PARAMS)
    plain, inner_state = jax.jit(inner.update)(GOOD, inner.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(scaled, plain, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(opt_state.inner, inner_state, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal_dtypes(opt_state, tx.init(PARAMS))


def test_the_scale_never_becomes_infinite():
    tx = dynamic_loss_scale(optax.sgd(1.0), initial=2.0**126, growth_interval=1)
    opt_state = tx.init(jnp.ones(1))
    for _ in range(5):
        _, opt_state = tx.update(jnp.ones(1), opt_state)
    assert float(loss_scale_of(opt_state)) == 2.0**127


def test_float16_training_recovers_gradients_that_underflow():
    """A gradient of 1e-8 is zero in float16 unless the loss is scaled; the first scales overflow and are skipped."""
    tx = dynamic_loss_scale(optax.sgd(1.0), initial=2.0**40)

    def loss(w, small, scale):
        return jnp.sum(w.astype(jnp.float16) * small * small * scale.astype(jnp.float16))

    @jax.jit
    def step(w, small, opt_state):
        scale = loss_scale_of(opt_state)
        return tx.update(jax.grad(loss)(w, small, scale) / scale, opt_state)

    opt_state, moved, small = tx.init(jnp.ones(1)), [], jnp.float16(1e-4)
    for _ in range(30):
        updates, opt_state = step(jnp.ones(1), small, opt_state)
        moved.append(float(updates[0]))
    assert float(jax.grad(loss)(jnp.ones(1), small, jnp.float32(1.0))[0]) == 0.0
    assert float(loss_scale_of(opt_state)) == 2.0**15
    assert moved[:25] == [0.0] * 25
    np.testing.assert_allclose(moved[25:], -1e-8, rtol=1e-2)


def test_frozen_leaves_and_empty_trees_pass():
    tx = dynamic_loss_scale(optax.sgd(1.0))
    updates, opt_state = tx.update({"a": jnp.ones(1), "b": None}, tx.init({"a": jnp.ones(1), "b": None}))
    assert updates["b"] is None
    assert int(opt_state.good_steps) == 1
    _, opt_state = tx.update({}, tx.init({}))
    assert int(opt_state.good_steps) == 1


def test_integer_counts_keep_their_type_when_skipped():
    tx = dynamic_loss_scale(optax.adam(0.1))
    _, opt_state = tx.update(bad_grads(jnp.inf), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, tx.init(PARAMS))


def test_the_scale_is_found_inside_of_wrappers():
    tx = optax.chain(optax.identity(), dynamic_loss_scale(optax.sgd(1.0), initial=8.0))
    assert float(loss_scale_of(tx.init(PARAMS))) == 8.0
    assert loss_scale_of(optax.adam(0.1).init(PARAMS)) is None


def test_all_problems_come_at_once():
    with pytest.raises(JaxdlError) as error:
        dynamic_loss_scale(optax.sgd(1.0), initial=-1.0, factor=1.0, growth_interval=0, minimum=2.0)
    for part in ("4 problem(s)", "initial=-1.0", "factor=1.0", "growth_interval=0", "minimum=2.0"):
        assert part in str(error.value)


@pytest.mark.parametrize("interval", [2.5, True, "10"])
def test_the_growth_interval_is_a_whole_number(interval):
    with pytest.raises(JaxdlError, match="growth_interval="):
        dynamic_loss_scale(optax.sgd(1.0), growth_interval=interval)


def test_updates_are_exact_under_powers_of_two():
    """Scaling by a power of two and back changes no bit, so a scaled run equals an unscaled one."""
    tx, w = dynamic_loss_scale(optax.sgd(0.1)), jnp.float32(np.random.default_rng(0).normal(size=8))
    opt_state = tx.init(w)
    scale = loss_scale_of(opt_state)
    grads = jax.grad(lambda w: scale * jnp.sum(jnp.sin(w)))(w) / scale
    updates, _ = tx.update(grads, opt_state, w)
    np.testing.assert_array_equal(updates, -0.1 * jax.grad(lambda w: jnp.sum(jnp.sin(w)))(w))
