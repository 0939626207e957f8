"""L1, L2, elastic net and decay against NumPy float64; exact zeros against ISTA; the laws of their rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdl.errors import JaxdlError
from jaxdl.optim import (
    DECAY_RULES,
    add_l1,
    add_l2,
    decoupled_weight_decay,
    make_optimizer,
    multipliers,
    penalty,
    proximal_l1,
    scale_by_rules,
    soft_threshold,
)
from jaxdl.paths import RuleError, match

RATE, L1, L2 = 0.1, 0.3, 0.7
FACTORS = {"body": {"kernel": 0.5, "bias": 0.0}, "head": {"kernel": 1.0, "bias": 0.0}}
RULES = [("head/kernel", True), ("body/kernel", 0.5), (".*", False)]
floats = st.floats(-100, 100, width=32)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    shapes = {"body": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (4, 2), "bias": (2,)}}
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


@pytest.fixture
def grads(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), params)


def numpy_step(params, grads, strength, *, rate=RATE):
    """One step of gradient descent in float64 on `grads + strength(w, m)`."""

    def of_leaf(w, g, m):
        w = w.astype(np.float64)
        return w - rate * (g + strength(w, m))

    return jax.tree.map(of_leaf, params, grads, FACTORS)


def one_step(tx, params, grads):
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def assert_close(actual, expected, rtol=1e-6, atol=1e-7):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


SUBGRADIENT = {"l1": L1, "l1_rules": RULES, "l1_method": "subgradient"}


@pytest.mark.parametrize(
    ("keywords", "strength"),
    [
        ({"l2": L2, "l2_rules": RULES}, lambda w, m: L2 * m * w),
        (SUBGRADIENT, lambda w, m: L1 * m * np.sign(w)),
        ({**SUBGRADIENT, "l2": L2, "l2_rules": RULES}, lambda w, m: L1 * m * np.sign(w) + L2 * m * w),
        ({"weight_decay": L2, "weight_decay_rules": RULES}, lambda w, m: L2 * m * w),
    ],
    ids=["l2", "l1", "elastic-net", "decay"],
)
@pytest.mark.parametrize("use_jit", [False, True])
def test_penalised_gradient_descent_is_the_formula(params, grads, keywords, strength, use_jit):
    tx = make_optimizer("gd", learning_rate=RATE, **keywords)
    step = jax.jit(lambda p, g: one_step(tx, p, g)) if use_jit else (lambda p, g: one_step(tx, p, g))
    assert_close(step(params, grads), numpy_step(params, grads, strength))


def test_the_proximal_elastic_net_is_the_formula(params, grads):
    tx = make_optimizer("gd", learning_rate=RATE, l1=L1, l1_rules=RULES, l2=L2, l2_rules=RULES)
    smooth = numpy_step(params, grads, lambda w, m: L2 * m * w)
    shrunk = jax.tree.map(lambda w, m: np.sign(w) * np.maximum(np.abs(w) - RATE * L1 * m, 0), smooth, FACTORS)
    assert_close(one_step(tx, params, grads), shrunk)


def test_decoupled_decay_of_adam_is_not_scaled_by_the_moments(params, grads):
    tx = make_optimizer("adamw", learning_rate=RATE, weight_decay=L2, weight_decay_rules=RULES)

    def of_leaf(w, g, m):  # the first bias-corrected Adam step is g / (|g| + eps)
        w, g = w.astype(np.float64), g.astype(np.float64)
        return w - RATE * (g / (np.abs(g) + 1e-8) + L2 * m * w)

    expected = jax.tree.map(of_leaf, params, grads, FACTORS)
    assert_close(one_step(tx, params, grads), expected, atol=2e-6)  # Optax rounds 1 - b2 in float32


def test_coupled_l2_of_adam_is_scaled_by_the_moments(params, grads):
    tx = make_optimizer("adam", learning_rate=RATE, l2=100.0, l2_rules=[(".*", True)])
    moved = jax.tree.map(lambda new, w: np.abs(new - w), one_step(tx, params, grads), params)
    jax.tree.map(lambda step: np.testing.assert_array_less(step, RATE * 1.0001), moved)


@pytest.mark.parametrize("make", [add_l1, add_l2, decoupled_weight_decay])
def test_the_parts_work_alone_and_leave_other_leaves_bit_for_bit(params, grads, make):
    updates, _ = jax.jit(make(0.5).update)(grads, optax.EmptyState(), params)
    for layer in ("body", "head"):
        np.testing.assert_array_equal(updates[layer]["bias"], grads[layer]["bias"])
        change = 0.5 * (np.sign(params[layer]["kernel"]) if make is add_l1 else params[layer]["kernel"])
        np.testing.assert_allclose(updates[layer]["kernel"], grads[layer]["kernel"] + change, rtol=1e-6)


@pytest.mark.parametrize(("l1", "l2"), [(L1, 0.0), (0.0, L2), (L1, L2)])
def test_the_gradient_of_the_penalty_is_what_is_added(params, l1, l2):
    zeros = jax.tree.map(np.zeros_like, params)
    tx = optax.chain(add_l1(l1, RULES), add_l2(l2, RULES))
    added, _ = tx.update(zeros, tx.init(params), params)
    assert_close(jax.grad(lambda p: penalty(p, l1=l1, l2=l2, rules=RULES))(params), added)


def test_the_value_of_the_penalty(params):
    def of_leaf(w, m):
        w = w.astype(np.float64)
        return m * (L1 * np.abs(w).sum() + L2 / 2 * np.square(w).sum())

    expected = sum(jax.tree.leaves(jax.tree.map(of_leaf, params, FACTORS)))
    np.testing.assert_allclose(penalty(params, l1=L1, l2=L2, rules=RULES), expected, rtol=1e-6)
    apart = penalty(params, l1=L1, rules=RULES) + penalty(params, l2=L2, rules=RULES)
    np.testing.assert_allclose(apart, expected, rtol=1e-6)


def test_the_penalty_of_half_a_tree_counts_that_half(params):
    half = {"body": {"kernel": None, "bias": params["body"]["bias"]}, "head": params["head"]}
    expected = L1 * np.abs(params["head"]["kernel"]).sum()
    np.testing.assert_allclose(penalty(half, l1=L1), expected, rtol=1e-6)
    assert float(penalty({"bias": jnp.ones(3)}, l1=L1)) == 0.0


@given(hnp.arrays(np.float32, 5, elements=floats), st.floats(0, 50, width=32))
@settings(max_examples=50, deadline=None)
def test_soft_threshold_minimises_its_objective(x, threshold):
    """The proximal operator is the argmin of (z - x)^2 / 2 + t |z|, entry by entry."""
    z = np.asarray(soft_threshold(x, threshold))
    x, threshold = x.astype(np.float64), float(threshold)
    best = (z - x) ** 2 / 2 + threshold * np.abs(z)
    for other in (x, np.zeros(5), z + 0.1, z - 0.1):
        assert np.all(best <= (other - x) ** 2 / 2 + threshold * np.abs(other) + 1e-3)
    np.testing.assert_array_equal(z == 0, flushed(np.abs(flushed(x)) - flushed(threshold)) <= 0)


def flushed(x):
    """What is too small for a normal float32 is 0 to XLA on a CPU."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)


def numpy_ista(features, target, *, l1, rate, n_steps):
    w = np.zeros(features.shape[1])
    for _ in range(n_steps):
        w = w - rate * features.T @ (features @ w - target) / len(target)
        w = np.sign(w) * np.maximum(np.abs(w) - rate * l1, 0)
    return w


@pytest.mark.parametrize("name", ["gd", "sgd"])
def test_lasso_equals_ista_and_has_exact_zeros(name):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(64, 20))
    target = features @ np.concatenate([[3.0, -2.0, 1.5], np.zeros(17)]) + 0.1 * rng.normal(size=64)
    tx = make_optimizer(name, learning_rate=0.2, l1=0.2, l1_rules=[(".*", True)])
    x, y = jnp.float32(features), jnp.float32(target)

    def step(carry, _):
        w, opt_state = carry
        updates, opt_state = tx.update(x.T @ (x @ w - y) / 64, opt_state, w)
        return (optax.apply_updates(w, updates), opt_state), None

    w = jnp.zeros(20)
    (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=300))()
    expected = numpy_ista(features, target, l1=0.2, rate=0.2, n_steps=300)
    np.testing.assert_allclose(w, expected, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(w) == 0.0, expected == 0.0)
    assert 10 < np.sum(expected == 0.0) < 20


def test_the_subgradient_has_no_exact_zeros_where_the_proximal_step_does():
    params, grads = {"kernel": jnp.linspace(-0.05, 0.05, 8)}, {"kernel": jnp.zeros(8)}
    made = {
        method: make_optimizer("gd", learning_rate=0.1, l1=1.0, l1_method=method)
        for method in ("proximal", "subgradient")
    }
    zeros = {method: int(jnp.sum(one_step(tx, params, grads)["kernel"] == 0)) for method, tx in made.items()}
    assert zeros == {"proximal": 8, "subgradient": 0}


def test_the_threshold_uses_the_rate_of_the_same_update():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.5})
    tx = make_optimizer("gd", learning_rate=schedule, l1=1.0, lr_scale_rules=[("a/.*", 1.0), ("b/.*", 0.5)])
    params = {"a": {"kernel": jnp.full(1, 8.0)}, "b": {"kernel": jnp.full(1, 8.0)}}
    opt_state, update, path = tx.init(params), jax.jit(tx.update), []
    for _ in range(3):
        updates, opt_state = update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
        path.append((float(params["a"]["kernel"][0]), float(params["b"]["kernel"][0])))
    assert path == [(7.0, 7.5), (6.5, 7.25), (6.25, 7.125)]


def test_the_threshold_follows_a_plateau():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = make_optimizer("gd", learning_rate=1.0, l1=1.0, plateau=plateau)
    params = {"kernel": jnp.full(1, 8.0)}
    opt_state = tx.init(params)
    for expected in (7.0, 6.5, 6.25):
        updates, opt_state = tx.update({"kernel": jnp.zeros(1)}, opt_state, params, value=1.0)
        params = optax.apply_updates(params, updates)
        assert float(params["kernel"][0]) == expected


def test_a_leaf_that_does_not_move_is_not_thresholded():
    tx = make_optimizer("gd", learning_rate=1.0, l1=1.0, lr_scale_rules=[(".*", 0)])
    params = {"kernel": jnp.array([0.1, 3.0])}
    np.testing.assert_array_equal(one_step(tx, params, params)["kernel"], params["kernel"])


def test_proximal_l1_alone_in_a_chain():
    tx = optax.chain(optax.sgd(0.5), proximal_l1(1.0, RULES, learning_rate=0.5))
    params = {"body": {"kernel": jnp.full(2, 3.0)}, "head": {"kernel": jnp.full(2, -0.4)}, "bias": jnp.ones(2)}
    new = one_step(tx, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(new["body"]["kernel"], [2.75, 2.75])
    np.testing.assert_array_equal(new["head"]["kernel"], [0.0, 0.0])
    np.testing.assert_array_equal(new["bias"], [1.0, 1.0])


def test_bfloat16_updates_stay_bfloat16():
    params = {"kernel": jnp.ones(3, jnp.bfloat16)}
    tx = make_optimizer("gd", learning_rate=0.5, l1=0.1, l2=0.1, weight_decay=0.1, lr_scale_rules=[(".*", 0.5)])
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["kernel"].dtype == jnp.bfloat16
    # -0.25 (1 + 0.1 + 0.1) - 0.25 * 0.1
    np.testing.assert_allclose(float(updates["kernel"][0]), -0.325, rtol=0.02)


def test_multipliers_of_the_default_rules_equal_the_written_ones(params):
    assert multipliers(None, params, what="l2") == jax.tree.map(float, match(DECAY_RULES, params))
    tree = {"embed": {"embedding": 1}, "kernel": 2, "norm": {"scale": 3}, "kernel_init": 4, "mykernel": 5}
    written = jax.tree.map(float, match(DECAY_RULES, tree))
    assert multipliers(None, tree, what="l2") == written
    assert written == {
        "embed": {"embedding": 1.0},
        "kernel": 1.0,
        "norm": {"scale": 0.0},
        "kernel_init": 0.0,
        "mykernel": 0.0,
    }


@pytest.mark.parametrize("tree", [{"bias": 1.0}, {"kernel": 1.0}, {"kernel": None, "bias": 1.0}, {"kernel": None}])
def test_the_default_rules_tolerate_trees_that_lack_their_paths(tree):
    tree = jax.tree.map(jnp.float32, tree)
    tx = make_optimizer("sgd", learning_rate=0.1, weight_decay=0.1, l1=0.1, l2=0.1)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


@pytest.mark.parametrize("keyword", ["weight_decay", "l1", "l2", "lr_scale"])
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("head/kernl", True), (".*", False)], "matches nothing; nearest paths: head/kernel"),
        ([("head/.*", True)], "no rule covers body/bias, body/kernel"),
        ([(".*", -1.0)], "value -1.0 must be"),
        ([(".*", "yes")], "value 'yes' must be"),
        ([(".*", float("nan"))], "value nan must be"),
    ],
)
def test_given_rules_obey_both_laws_at_init(params, keyword, rules, message):
    strength = {} if keyword == "lr_scale" else {keyword: 0.1}
    tx = make_optimizer("gd", learning_rate=0.1, **strength, **{f"{keyword}_rules": rules})
    with pytest.raises(RuleError, match=message) as error:
        tx.init(params)
    assert str(error.value).startswith(f"{keyword} rules")


def test_given_rules_obey_the_laws_in_a_penalty(params):
    with pytest.raises(RuleError, match="penalty rules"):
        penalty(params, l1=0.1, rules=[("nothing", 1), (".*", 0)])


@pytest.mark.parametrize("make", [add_l1, add_l2, decoupled_weight_decay])
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_must_not_be_negative(make, weight):
    with pytest.raises(JaxdlError, match="must be a finite number >= 0"):
        make(weight)


@pytest.mark.parametrize("tx", [add_l1(0.1), scale_by_rules([(".*", 1)]), proximal_l1(0.1, learning_rate=0.1)])
def test_forgetting_the_parameters_is_a_readable_error(params, grads, tx):
    with pytest.raises(JaxdlError, match=r"tx\.update\(grads, opt_state, params\)"):
        tx.update(grads, tx.init(params))


def test_extra_arguments_are_ignored(params, grads):
    for tx in (add_l1(0.1), add_l2(0.1), decoupled_weight_decay(0.1), proximal_l1(0.1, learning_rate=0.1)):
        with_extra, _ = tx.update(grads, tx.init(params), params, value=1.0, anything="x")
        without, _ = tx.update(grads, tx.init(params), params)
        jax.tree.map(np.testing.assert_array_equal, with_extra, without)
