"""Averages against NumPy float64 loops, and the swap to evaluation parameters on full and half trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.errors import JaxdlError
from jaxdl.optim import dynamic_loss_scale, ema, ema_params, eval_params, make_optimizer
from jaxdl.paths import merge, split


def follow(tx, values, *, start=0.0, dtype=jnp.float32):
    """Moves one parameter through `values`; returns the final parameters and state."""
    params = {"kernel": jnp.full(1, start, dtype)}
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for value in values:
        updates, opt_state = update({"kernel": params["kernel"] - value}, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def numpy_ema(values, decay, *, debias, start):
    average = 0.0 if debias else start
    for value in values:
        average = decay * average + (1 - decay) * value
    return average / (1 - decay ** len(values)) if debias else average


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12),
    st.floats(0.0, 0.999),
    st.booleans(),
    st.floats(-10, 10, width=32),
)
@settings(max_examples=25, deadline=None)
def test_ema_is_the_formula(values, decay, debias, start):
    params, opt_state = follow(optax.chain(optax.sgd(1.0), ema(decay, debias)), values, start=start)
    expected = numpy_ema(values, decay, debias=debias, start=start)
    np.testing.assert_allclose(ema_params(opt_state, params)["kernel"][0], expected, rtol=1e-4, atol=1e-4)


def test_the_update_passes_unchanged():
    params, grads = {"kernel": jnp.ones(3)}, {"kernel": jnp.arange(3.0)}
    updates, _ = ema(0.9).update(grads, ema(0.9).init(params), params)
    assert updates is grads


def test_make_optimizer_averages_the_thresholded_parameters():
    """The average comes last: it sees the exact zeros of the proximal step."""
    tx = make_optimizer("gd", learning_rate=1.0, l1=100.0, ema_decay=0.5)
    params, opt_state = follow(tx, [1.0, 2.0, 3.0])
    assert float(params["kernel"][0]) == 0.0
    assert float(ema_params(opt_state, params)["kernel"][0]) == 0.0


def test_the_average_of_make_optimizer_is_debiased():
    params, opt_state = follow(make_optimizer("gd", learning_rate=1.0, ema_decay=0.5), [1.0, 2.0])
    np.testing.assert_allclose(ema_params(opt_state, params)["kernel"], (0.25 * 1 + 0.5 * 2) / 0.75, rtol=1e-6)


@pytest.mark.parametrize("debias", [True, False])
def test_before_the_first_update_the_average_is_the_parameters(debias):
    params = {"kernel": jnp.full(2, 3.0)}
    np.testing.assert_array_equal(ema_params(ema(0.9, debias).init(params), params)["kernel"], params["kernel"])


def test_a_slow_average_of_bfloat16_does_not_stall():
    """In bfloat16, 1 + 0.001 * (2 - 1) is 1: the average must be kept wider than the parameters."""
    tx = optax.chain(optax.sgd(1.0), ema(0.999, debias=False))
    params, opt_state = follow(tx, [2.0] * 700, start=1.0, dtype=jnp.bfloat16)
    averaged = ema_params(opt_state, params)["kernel"]
    assert averaged.dtype == jnp.bfloat16
    np.testing.assert_allclose(averaged.astype(np.float32), 2 - 0.999**700, rtol=0.01)


def test_the_average_does_not_share_the_buffer_of_the_parameters():
    params = {"kernel": jnp.ones(3)}
    opt_state = ema(0.9, debias=False).init(params)
    params["kernel"].delete()
    np.testing.assert_array_equal(opt_state.average["kernel"], np.ones(3))


@pytest.fixture
def halves():
    params = {"body": {"kernel": jnp.full((2, 2), 5.0)}, "head": {"kernel": jnp.full((2, 2), 1.0), "bias": jnp.ones(2)}}
    mask = {"body": {"kernel": False}, "head": {"kernel": True, "bias": True}}
    return split(params, mask)


@pytest.mark.parametrize("wrap", [lambda tx: tx, dynamic_loss_scale], ids=["plain", "loss-scaled"])
@pytest.mark.parametrize("keywords", [{"ema_decay": 0.5}, {"name": "schedule_free_sgd"}], ids=["ema", "schedule-free"])
def test_the_swap_takes_frozen_leaves_from_the_full_tree(halves, keywords, wrap):
    trainable, frozen = halves
    tx = wrap(make_optimizer(**{"name": "gd", **keywords}, learning_rate=0.5))
    opt_state, update = tx.init(trainable), jax.jit(tx.update)
    for _ in range(3):
        updates, opt_state = update(jax.tree.map(jnp.ones_like, trainable), opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    full = merge(trainable, frozen)
    swapped, half = jax.jit(eval_params)(opt_state, full), eval_params(opt_state, trainable)
    assert jax.tree.structure(swapped) == jax.tree.structure(full)
    assert half["body"]["kernel"] is None
    np.testing.assert_array_equal(swapped["body"]["kernel"], frozen["body"]["kernel"])
    # The parameters fall from step to step, so that any average of them lies above the last.
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(swapped["head"][name], half["head"][name], rtol=1e-6)
        assert np.all(np.asarray(swapped["head"][name]) > np.asarray(trainable["head"][name]))


def numpy_schedule_free(w, gradient, *, rates, beta):
    """Algorithm 1 of Defazio et al., 2024, with weights gamma^2, in float64; returns y and x."""
    z, x, total = w, w, 0.0
    for rate in rates:
        y = (1 - beta) * z + beta * x
        z = z - rate * gradient(y)
        total += max(rates[: rates.index(rate) + 1]) ** 2
        c = max(rates[: rates.index(rate) + 1]) ** 2 / total
        x = (1 - c) * x + c * z
    return (1 - beta) * z + beta * x, x


def test_schedule_free_follows_the_paper_under_a_warmup():
    """The weights of the average use the rate of the same update, also while it changes."""
    rates, target = [0.1, 0.2, 0.3, 0.4], np.array([1.0, -2.0])
    tx = make_optimizer("schedule_free_sgd", learning_rate=optax.linear_schedule(0.1, 0.5, 4))
    params = {"kernel": jnp.zeros(2)}
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for _ in rates:
        updates, opt_state = update({"kernel": params["kernel"] - jnp.float32(target)}, opt_state, params)
        params = optax.apply_updates(params, updates)
    y, x = numpy_schedule_free(np.zeros(2), lambda w: w - target, rates=rates, beta=0.9)
    np.testing.assert_allclose(params["kernel"], y, rtol=1e-5)
    np.testing.assert_allclose(eval_params(opt_state, params)["kernel"], x, rtol=1e-5)


def test_eval_params_without_an_average_is_params():
    params = {"kernel": jnp.ones(2)}
    assert eval_params(make_optimizer(learning_rate=0.1).init(params), params) is params


def test_ema_params_without_an_average_is_an_error():
    params = {"kernel": jnp.ones(2)}
    with pytest.raises(JaxdlError, match="holds no average"):
        ema_params(make_optimizer(learning_rate=0.1).init(params), params)


@pytest.mark.parametrize("keywords", [{"ema_decay": 0.5}, {"name": "schedule_free_adamw"}])
def test_the_wrong_tree_is_an_error(keywords):
    opt_state = make_optimizer(learning_rate=0.1, **keywords).init({"kernel": jnp.ones(2)})
    with pytest.raises(JaxdlError, match=r"leaves that params lacks: \['kernel'\]"):
        eval_params(opt_state, {"bias": jnp.ones(2)})


def test_averages_of_parts_are_put_together():
    """Under optax.partition each part keeps its own average."""
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    parts = {key: make_optimizer("gd", learning_rate=rate, ema_decay=0.5) for key, rate in (("x", 1.0), ("y", 2.0))}
    tx = optax.partition(parts, {"a": "x", "b": "y"})
    updates, opt_state = tx.update({"a": -jnp.ones(1), "b": -jnp.ones(1)}, tx.init(params), params)
    averaged = ema_params(opt_state, optax.apply_updates(params, updates))
    np.testing.assert_allclose([averaged["a"][0], averaged["b"][0]], [1.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(JaxdlError, match="must be in"):
        ema(decay)


def test_forgetting_the_parameters_is_a_readable_error():
    params = {"kernel": jnp.ones(2)}
    with pytest.raises(JaxdlError, match="needs the parameters"):
        ema(0.9).update(params, ema(0.9).init(params))
