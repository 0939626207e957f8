"""Schedules against closed forms; the rate that is logged against the rate that moved the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.errors import JaxdlError
from jaxdl.optim import SCHEDULES, find_states, learning_rate_of, make_optimizer, make_schedule, with_learning_rate

PEAK, END, STEPS, WARMUP = 0.4, 0.01, 20, 4
PARAMS = {"kernel": np.zeros(1, np.float32)}
GRADS = {"kernel": np.ones(1, np.float32)}


def closed_form(name, step, *, peak, steps, warmup, end, power=2.0, div_factor=25.0):
    """The table of make_schedule's docstring in float64."""
    if name == "one_cycle":
        if step < warmup:
            start = peak / div_factor
            return start + (peak - start) * (1 - np.cos(np.pi * step / warmup)) / 2
        name = "cosine"
    if step < warmup:
        return peak * step / warmup
    t = min(1.0, (step - warmup) / (steps - warmup))
    return {
        "constant": peak,
        "cosine": end + (peak - end) * (1 + np.cos(np.pi * t)) / 2,
        "linear": peak + (end - peak) * t,
        "exponential": peak * (end / peak) ** t if end else None,
        "polynomial": end + (peak - end) * (1 - t) ** power,
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_the_closed_form(name):
    end = 0.0 if name == "constant" else END
    rate = make_schedule(name, peak=PEAK, steps=STEPS, warmup_steps=WARMUP, end=end)
    for step in (0, 1, 3, WARMUP, 5, 12, 19, STEPS, STEPS + 100):
        expected = closed_form(name, step, peak=PEAK, steps=STEPS, warmup=WARMUP, end=end)
        np.testing.assert_allclose(rate(step), expected, rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_start_peak_and_end_by_hand(name):
    end = {"constant": 0.0, "exponential": END}.get(name, 0.0)
    rate = make_schedule(name, peak=PEAK, steps=STEPS, warmup_steps=WARMUP, end=end)
    assert float(rate(0)) == pytest.approx(PEAK / 25 if name == "one_cycle" else 0.0)
    assert float(rate(WARMUP)) == pytest.approx(PEAK)
    assert float(rate(STEPS)) == pytest.approx(PEAK if name == "constant" else end, abs=1e-8)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "exponential", "polynomial"])
def test_without_warmup_the_first_rate_is_the_peak(name):
    rate = make_schedule(name, peak=PEAK, steps=STEPS, end=0.0 if name == "constant" else END)
    assert float(rate(0)) == pytest.approx(PEAK)


def test_options_reach_their_schedule():
    cubic = make_schedule("polynomial", peak=1.0, steps=10, power=3.0)
    np.testing.assert_allclose(cubic(5), 0.125, rtol=1e-6)
    gentle = make_schedule("one_cycle", peak=1.0, steps=10, warmup_steps=2, div_factor=4.0)
    np.testing.assert_allclose(gentle(0), 0.25, rtol=1e-6)


def test_one_cycle_peaks_at_30_percent_by_default():
    rate = make_schedule("one_cycle", peak=PEAK, steps=100)
    assert int(np.argmax([rate(step) for step in range(101)])) == 30


@given(st.integers(1, 200).flatmap(lambda warmup: st.tuples(st.just(warmup), st.integers(warmup + 1, 400))))
@settings(max_examples=25, deadline=None)
def test_the_peak_stands_at_the_end_of_the_warmup(lengths):
    warmup, steps = lengths
    for name in ("cosine", "one_cycle"):
        rate = make_schedule(name, peak=1.0, steps=steps, warmup_steps=warmup)
        np.testing.assert_allclose(rate(warmup), 1.0, rtol=1e-6)
        assert float(rate(warmup - 1)) < 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_is_all_warmup_still_reaches_the_peak(name):
    rate = make_schedule(name, peak=1.0, steps=5, warmup_steps=5, end=0.5 if name == "exponential" else 0.0)
    assert float(rate(5)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_jit_agrees(name):
    rate = make_schedule(name, peak=PEAK, steps=STEPS, warmup_steps=WARMUP, end=0.0 if name == "constant" else END)
    for step in (0, 2, WARMUP, 11, STEPS):
        np.testing.assert_allclose(jax.jit(rate)(jnp.int32(step)), rate(step), rtol=3e-6, atol=1e-8)


def test_errors_come_all_at_once_with_the_nearest_names():
    with pytest.raises(JaxdlError) as error:
        make_schedule("cosin", peak=-1.0, steps=0, warmup_steps=-2, end=float("nan"))
    for part in ("peak=-1.0", "steps=0", "warmup_steps=-2", "end=nan", "'cosin'", "nearest: cosine", "5 problem(s)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosine", "steps": 10, "warmup_steps": 11}, "warmup_steps=11 is longer than steps=10"),
        ({"name": "constant", "steps": 10, "end": 0.1}, "no meaning for a constant"),
        ({"name": "exponential", "steps": 10}, "never reached by an exponential"),
        ({"name": "cosine", "steps": 10, "power": 2.0}, "no option 'power'"),
        ({"name": "polynomial", "steps": 10, "powr": 2.0}, "nearest: power"),
        ({"name": "polynomial", "steps": 10, "power": 0.0}, "power=0.0 must be"),
        ({"name": "linear", "steps": 10.0}, "steps=10.0 must be a whole number"),
        ({"name": "linear", "steps": True}, "steps=True must be a whole number"),
    ],
)
def test_each_error(arguments, message):
    with pytest.raises(JaxdlError, match=message.replace("(", r"\(")):
        make_schedule(peak=1.0, **arguments)


@pytest.mark.parametrize("use_jit", [False, True])
def test_the_logged_rate_is_the_rate_that_moved_the_parameters(use_jit):
    schedule = make_schedule("cosine", peak=PEAK, steps=8, warmup_steps=3)
    tx = make_optimizer("gd", learning_rate=schedule)
    update = jax.jit(tx.update) if use_jit else tx.update
    opt_state = tx.init(PARAMS)
    for step in range(8):
        updates, opt_state = update(GRADS, opt_state, PARAMS)
        logged = float(learning_rate_of(opt_state))
        assert logged == -float(updates["kernel"][0])
        assert logged == pytest.approx(float(schedule(step)), rel=1e-6)


def test_before_the_first_update_the_state_shows_the_first_rate():
    tx = make_optimizer("gd", learning_rate=optax.linear_schedule(0.5, 0.0, 2))
    assert float(learning_rate_of(tx.init(PARAMS))) == 0.5


@pytest.mark.parametrize("name", ["adamw", "lars", "rmsprop", "adafactor", "schedule_free_sgd"])
def test_one_rate_serves_all_parts(name):
    """Where Optax keeps its own count of updates, the rate it uses is still the one that is logged."""
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    params = {"kernel": jnp.ones((2, 3))}
    tx, opt_state = make_optimizer(name, learning_rate=schedule), None
    opt_state = tx.init(params)
    for step in range(3):
        _, opt_state = tx.update(params, opt_state, params)
        assert float(learning_rate_of(opt_state)) == 1.0 - step / 4


def test_plateau_scales_the_logged_and_the_applied_rate():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    tx = make_optimizer("gd", learning_rate=0.8, plateau=plateau)
    opt_state, update, rates = tx.init(PARAMS), jax.jit(tx.update), []
    for loss in (3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0):
        updates, opt_state = update(GRADS, opt_state, PARAMS, value=jnp.float32(loss))
        rates.append(float(learning_rate_of(opt_state)))
        assert rates[-1] == -float(updates["kernel"][0])
    np.testing.assert_allclose(rates, [0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2], rtol=1e-6)


def test_plateau_without_the_loss_is_a_readable_error():
    tx = make_optimizer("gd", learning_rate=0.8, plateau=optax.contrib.reduce_on_plateau())
    with pytest.raises(JaxdlError, match="value=loss"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_a_plateau_further_down_the_chain_is_found():
    tx = optax.chain(make_optimizer("gd", learning_rate=0.8), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    opt_state = tx.init(PARAMS)
    for _ in range(3):
        updates, opt_state = tx.update(GRADS, opt_state, PARAMS, value=1.0)
    assert float(learning_rate_of(opt_state)) == pytest.approx(0.2)
    assert float(learning_rate_of(opt_state)) == -float(updates["kernel"][0])


def test_injected_rates_of_other_optimizers_are_found():
    tx = optax.chain(optax.clip(9.0), optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 4)))
    opt_state = tx.init(PARAMS)
    for _ in range(2):
        updates, opt_state = tx.update(GRADS, opt_state, PARAMS)
    assert float(learning_rate_of(opt_state)) == 0.75 == -float(updates["kernel"][0])


def test_a_plateau_inside_of_an_injected_optimizer_is_counted_once():
    def with_plateau(learning_rate):
        return optax.chain(optax.sgd(learning_rate), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))

    tx = optax.inject_hyperparams(with_plateau)(learning_rate=0.5)
    opt_state = tx.init(PARAMS)
    for _ in range(2):
        updates, opt_state = tx.update(GRADS, opt_state, PARAMS, value=jnp.float32(1.0))
    assert float(learning_rate_of(opt_state)) == 0.25 == -float(updates["kernel"][0])


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.inject_hyperparams(optax.trace)(decay=0.9)])
def test_no_rate_gives_none(tx):
    assert learning_rate_of(tx.init(PARAMS)) is None


def test_rates_under_wrappers_are_found():
    inner = make_optimizer("gd", learning_rate=0.5)
    for tx in (optax.MultiSteps(inner, 2), optax.masked(inner, True), optax.apply_if_finite(inner, 3)):
        assert float(learning_rate_of(tx.init(PARAMS))) == 0.5


def test_with_learning_rate_gives_each_update_its_rate():
    seen = []

    def make_inner(rate):
        seen.append(float(rate))
        return optax.sgd(rate)

    tx = with_learning_rate(make_inner, optax.linear_schedule(1.0, 0.0, 4))
    opt_state = tx.init(PARAMS)
    for _ in range(3):
        _, opt_state = tx.update(GRADS, opt_state)
    assert seen == [1.0, 1.0, 0.75, 0.5]
    assert int(opt_state.n_updates) == 3


def test_find_states_returns_all_in_order():
    opt_state = optax.chain(optax.trace(0.9), optax.chain(optax.trace(0.8), optax.adam(0.1))).init(PARAMS)
    assert len(find_states(opt_state, lambda node: isinstance(node, optax.TraceState))) == 2
