"""Every optimizer against Optax's own call and, where PyTorch has the same one, against PyTorch; order; errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.errors import JaxdlError
from jaxdl.optim import OPTIMIZERS, make_optimizer, options_of
from jaxdl.paths import merge, split

EVERYWHERE = [(".*", True)]
SCHEDULE = optax.linear_schedule(0.1, 0.02, 4)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    shapes = {"body": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (4, 2), "bias": (2,)}}
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def grads_at(step, params):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), params)


def train(tx, params, *, n_steps=3, update=None, first=0):
    """The parameters after each of a few updates with made-up gradients."""
    update, opt_state, path = update or jax.jit(tx.update), tx.init(params), []
    for step in range(first, first + n_steps):
        updates, opt_state = update(grads_at(step, params), opt_state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, opt_state


def assert_same(a, b, rtol=2e-6):
    chex.assert_trees_all_equal_structs(a, b)
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=1e-7)


# (name, options, strength of decay, the learning rate, Optax's own call)
CASES = [
    ("gd", {}, 0.0, SCHEDULE, optax.sgd(SCHEDULE)),
    ("sgd", {}, 0.0, 0.1, optax.sgd(0.1)),
    ("sgd", {"momentum": 0.8, "nesterov": True}, 0.0, 0.1, optax.sgd(0.1, 0.8, True)),
    ("momentum", {}, 0.0, SCHEDULE, optax.sgd(SCHEDULE, 0.9)),
    ("nesterov", {"momentum": 0.7}, 0.0, SCHEDULE, optax.sgd(SCHEDULE, 0.7, nesterov=True)),
    ("rmsprop", {}, 0.0, 0.1, optax.rmsprop(0.1)),
    (
        "rmsprop",
        {"momentum": 0.9, "centered": True},
        0.0,
        SCHEDULE,
        optax.rmsprop(SCHEDULE, momentum=0.9, centered=True),
    ),
    ("adagrad", {"eps": 1e-5}, 0.0, SCHEDULE, optax.adagrad(SCHEDULE, eps=1e-5)),
    ("adam", {"b2": 0.99}, 0.0, SCHEDULE, optax.adam(SCHEDULE, b2=0.99)),
    ("adam", {"nesterov": True}, 0.0, 0.1, optax.nadam(0.1)),
    ("adamw", {}, 0.3, SCHEDULE, optax.adamw(SCHEDULE, weight_decay=0.3)),
    ("lion", {}, 0.0, SCHEDULE, optax.lion(SCHEDULE, weight_decay=0.0)),
    ("lion", {"b2": 0.9}, 0.3, SCHEDULE, optax.lion(SCHEDULE, b2=0.9, weight_decay=0.3)),
    ("lamb", {}, 0.3, SCHEDULE, optax.lamb(SCHEDULE, weight_decay=0.3)),
    ("lars", {}, 0.3, SCHEDULE, optax.lars(SCHEDULE, weight_decay=0.3)),
    ("lars", {"nesterov": True, "momentum": 0.5}, 0.0, 0.1, optax.lars(0.1, nesterov=True, momentum=0.5)),
    ("adafactor", {}, 0.0, SCHEDULE, optax.adafactor(SCHEDULE)),
    (
        "adafactor",
        {"momentum": 0.9, "min_dim_size_to_factor": 2},
        0.3,
        SCHEDULE,
        optax.adafactor(SCHEDULE, 2, momentum=0.9, weight_decay_rate=0.3),
    ),
    ("muon", {}, 0.3, SCHEDULE, optax.contrib.muon(SCHEDULE, weight_decay=0.3, adam_weight_decay=0.3)),
    ("schedule_free_sgd", {}, 0.3, 0.1, optax.contrib.schedule_free_sgd(0.1, weight_decay=0.3)),
    ("schedule_free_adamw", {"b2": 0.99}, 0.3, 0.1, optax.contrib.schedule_free_adamw(0.1, b2=0.99, weight_decay=0.3)),
]


@pytest.mark.parametrize(("name", "options", "decay", "rate", "own"), CASES, ids=[case[0] for case in CASES])
def test_equals_optax(params, name, options, decay, rate, own):
    tx = make_optimizer(name, learning_rate=rate, weight_decay=decay, weight_decay_rules=EVERYWHERE, **options)
    (ours, _), (theirs, _) = train(tx, params), train(own, params)
    assert_same(ours, theirs)
    assert not np.allclose(ours[-1]["body"]["kernel"], params["body"]["kernel"])


def test_every_name_is_compared():
    assert {case[0] for case in CASES} == set(OPTIMIZERS)


@pytest.mark.parametrize(
    "name", ["momentum", "adamw", "rmsprop", "lars", "lamb", "adafactor", "muon", "schedule_free_sgd"]
)
def test_jit_is_the_same_as_no_jit(params, name):
    tx = make_optimizer(name, learning_rate=SCHEDULE, l2=0.1, clip_norm=1.0)
    # Muon's Newton-Schulz iteration amplifies the rounding of fused operations.
    rtol = 1e-3 if name == "muon" else 1e-5
    assert_same(train(tx, params, n_steps=2)[0], train(tx, params, n_steps=2, update=tx.update)[0], rtol=rtol)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_are_absent_and_the_state_keeps_its_types(params, name):
    """None leaves have no moments, and the others move as if the frozen ones were not in the tree."""
    chex.clear_trace_counter()
    mask = {"body": {"kernel": False, "bias": True}, "head": {"kernel": True, "bias": False}}
    trainable, frozen = split(params, mask)
    alone = {"body": {"bias": params["body"]["bias"]}, "head": {"kernel": params["head"]["kernel"]}}
    tx = make_optimizer(name, learning_rate=0.1, weight_decay=0.0 if name == "adam" else 0.1, l2=0.1, clip_norm=1.0)
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    (half, opt_state), (small, small_state) = train(tx, trainable, update=update), train(tx, alone)
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, tx.init(trainable))
    merged = merge(half[-1], frozen)
    np.testing.assert_array_equal(merged["body"]["kernel"], params["body"]["kernel"])
    np.testing.assert_array_equal(merged["body"]["bias"], small[-1]["body"]["bias"])
    np.testing.assert_array_equal(merged["head"]["kernel"], small[-1]["head"]["kernel"])
    chex.assert_trees_all_equal(jax.tree.leaves(opt_state), jax.tree.leaves(small_state))


def torch_path(make, params, n_steps=5):
    torch = pytest.importorskip("torch")
    leaves, treedef = jax.tree.flatten(params)
    weights = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves]
    optimizer, path = make(torch.optim, weights), []
    for step in range(n_steps):
        for weight, grad in zip(weights, jax.tree.leaves(grads_at(step, params)), strict=True):
            weight.grad = torch.tensor(grad)
        optimizer.step()
        path.append(jax.tree.unflatten(treedef, [weight.detach().numpy().copy() for weight in weights]))
    return path


@pytest.mark.parametrize(
    ("make", "name", "keywords"),
    [
        (lambda t, w: t.SGD(w, 0.1), "gd", {}),
        (lambda t, w: t.SGD(w, 0.1, momentum=0.9), "momentum", {}),
        (lambda t, w: t.SGD(w, 0.1, momentum=0.9, nesterov=True), "nesterov", {}),
        (lambda t, w: t.SGD(w, 0.1, momentum=0.9, weight_decay=0.3), "momentum", {"l2": 0.3, "l2_rules": EVERYWHERE}),
        (lambda t, w: t.Adam(w, 0.1), "adam", {}),
        (lambda t, w: t.Adam(w, 0.1, weight_decay=0.3), "adam", {"l2": 0.3, "l2_rules": EVERYWHERE}),
        (
            lambda t, w: t.AdamW(w, 0.1, weight_decay=0.3),
            "adamw",
            {"weight_decay": 0.3, "weight_decay_rules": EVERYWHERE},
        ),
        (lambda t, w: t.Adagrad(w, 0.1), "adagrad", {"initial_accumulator_value": 0.0, "eps": 1e-20}),
        (
            lambda t, w: t.RMSprop(w, 0.1, alpha=0.9, momentum=0.5),
            "rmsprop",
            {"momentum": 0.5, "eps_in_sqrt": False},
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "momentum-l2", "adam", "adam-l2", "adamw", "adagrad", "rmsprop"],
)
def test_equals_torch(params, make, name, keywords):
    tx = make_optimizer(name, learning_rate=0.1, **keywords)
    chex.assert_trees_all_close(train(tx, params, n_steps=5)[0], torch_path(make, params), rtol=1e-5, atol=3e-6)


def numpy_order(w, g, *, rate, clip_value, clip_norm, l2, l1, decay, scale):
    """Steps 1 to 8 of make_optimizer for gradient descent in float64; every key is treated alike but for `scale`."""
    g = {key: np.clip(value.astype(np.float64), -clip_value, clip_value) for key, value in g.items()}
    norm = np.sqrt(sum(np.sum(value**2) for value in g.values()))
    g = {key: value * min(1.0, clip_norm / norm) for key, value in g.items()}
    new = {}
    for key, value in g.items():
        smooth = w[key] - rate * scale[key] * (value + l2 * w[key] + decay * w[key])
        new[key] = np.sign(smooth) * np.maximum(np.abs(smooth) - rate * scale[key] * l1, 0)
    return new


@pytest.mark.parametrize("use_jit", [False, True])
def test_the_order_of_the_parts(use_jit):
    rng = np.random.default_rng(3)
    w = {key: rng.normal(size=5).astype(np.float32) for key in ("a", "b")}
    g = {key: 4 * rng.normal(size=5).astype(np.float32) for key in ("a", "b")}
    numbers = {"clip_value": 3.0, "clip_norm": 2.0, "l2": 0.5, "l1": 0.8}
    tx = make_optimizer(
        "gd",
        learning_rate=0.3,
        weight_decay=0.7,
        lr_scale_rules=[("a", 1.0), ("b", 0.2)],
        **numbers,
        **{f"{key}_rules": EVERYWHERE for key in ("l1", "l2", "weight_decay")},
    )
    update = jax.jit(tx.update) if use_jit else tx.update
    updates, _ = update(g, tx.init(w), w)
    expected = numpy_order(w, g, rate=0.3, decay=0.7, scale={"a": 1.0, "b": 0.2}, **numbers)
    chex.assert_trees_all_close(optax.apply_updates(w, updates), expected, rtol=1e-5, atol=1e-6)
    assert any(np.any(value == 0) for value in expected.values())


def test_clipping_sees_the_data_gradient_only():
    params, grads = {"kernel": jnp.full(1, 100.0)}, {"kernel": jnp.full(1, 0.5)}
    tx = make_optimizer("gd", learning_rate=1.0, l2=1.0, clip_norm=1.0, clip_value=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -100.5)


@pytest.mark.parametrize("name", ["gd", "adamw", "lamb", "lars", "rmsprop", "adafactor", "muon"])
def test_path_scales_multiply_the_update(params, name):
    whole = make_optimizer(name, learning_rate=0.1)
    scaled = make_optimizer(name, learning_rate=0.1, lr_scale_rules=[("body/.*", 0.25), (".*", True)])
    grads = grads_at(0, params)
    (a, _), (b, _) = (jax.jit(tx.update)(grads, tx.init(params), params) for tx in (whole, scaled))
    chex.assert_trees_all_close(b["body"], jax.tree.map(lambda u: 0.25 * u, a["body"]), rtol=1e-6)
    chex.assert_trees_all_close(b["head"], a["head"], rtol=1e-6)


def test_path_scales_in_schedule_free_scale_z():
    params, grads = {"a": jnp.ones(1), "b": jnp.ones(1)}, {"a": jnp.ones(1), "b": jnp.ones(1)}
    tx = make_optimizer("schedule_free_sgd", learning_rate=0.5, lr_scale_rules=[("a", 0.0), ("b", 1.0)])
    opt_state = tx.init(params)
    for _ in range(3):
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert float(params["a"][0]) == 1.0
    assert float(params["b"][0]) < 0.5


@pytest.mark.parametrize("name", ["rmsprop", "lion", "gd"])
def test_default_decay_leaves_biases_alone(params, name):
    plain, decayed = (make_optimizer(name, learning_rate=0.1, weight_decay=decay) for decay in (0.0, 0.5))
    grads = grads_at(0, params)
    (a, _), (b, _) = (jax.jit(tx.update)(grads, tx.init(params), params) for tx in (plain, decayed))
    np.testing.assert_array_equal(a["head"]["bias"], b["head"]["bias"])
    np.testing.assert_allclose(
        b["head"]["kernel"], a["head"]["kernel"] - 0.05 * params["head"]["kernel"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "schedule_free_adamw"])
def test_extra_arguments_are_ignored(params, name):
    tx = make_optimizer(name, learning_rate=0.1, clip_value=1.0, l2=0.1)
    grads = grads_at(0, params)
    with_value, _ = tx.update(grads, tx.init(params), params, value=jnp.float32(1.0))
    without, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(with_value, without)


def test_all_problems_come_at_once():
    with pytest.raises(JaxdlError) as error:
        make_optimizer(
            "adamw",
            learning_rate=-1.0,
            weight_decay=-0.1,
            l1=-1,
            clip_norm=0.0,
            ema_decay=1.0,
            l1_method="prox",
            b3=0.9,
        )
    for part in (
        "7 problem(s)",
        "learning_rate=-1.0",
        "weight_decay=-0.1",
        "l1=-1 ",
        "clip_norm=0.0",
        "ema_decay=1.0",
        "nearest: proximal",
        "adamw has no option 'b3'; nearest: b1, b2",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("adamv", {}, "there is no optimizer 'adamv'; nearest: adam"),
        ("adamw", {"weigth_decay": 0.1}, "nearest: weight_decay"),
        ("gd", {"momentum": 0.9}, "gd has no option 'momentum'"),
        ("adamw", {"mask": None}, "no option 'mask'"),
        ("adamw", {"b1": 1.0}, r"b1=1\.0 must be in \[0, 1\)"),
        ("adamw", {"eps": -1e-8}, "eps=-1e-08 must be a finite number >= 0"),
        ("adam", {"weight_decay": 0.1}, "use name='adamw'"),
        ("schedule_free_sgd", {"ema_decay": 0.9}, "keeps its own average"),
        ("schedule_free_sgd", {"l1": 0.1}, "use l1_method='subgradient'"),
        ("gd", {"l2": float("nan")}, "l2=nan must be"),
        ("gd", {"clip_value": -1}, "clip_value=-1 must be a finite number > 0, or None"),
    ],
)
def test_each_error(name, keywords, message):
    with pytest.raises(JaxdlError, match=message):
        make_optimizer(name, learning_rate=0.1, **keywords)


@pytest.mark.parametrize("rate", ["0.1", None, True, float("nan"), float("inf")])
def test_rates_that_are_none(rate):
    with pytest.raises(JaxdlError, match="learning_rate="):
        make_optimizer(learning_rate=rate)


def test_a_zero_rate_is_allowed_and_changes_nothing(params):
    path, _ = train(make_optimizer("adamw", learning_rate=0.0, weight_decay=0.1, l1=0.1), params)
    chex.assert_trees_all_equal(path[-1], jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_are_optax_defaults_without_rate_and_decay(name):
    options = options_of(name)
    assert not {"learning_rate", "weight_decay", "mask", "weight_decay_mask"} & set(options)
    make_optimizer(name, learning_rate=0.1, **options)


def test_options_of_an_unknown_optimizer():
    with pytest.raises(JaxdlError, match="nearest: lamb"):
        options_of("lambb")
