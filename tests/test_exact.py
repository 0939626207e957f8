"""Exact mode: the same bits on any number of devices, and what it refuses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, LossOut, create_state, guard, losses, make_train_step, repeat
from jaxdl.data import ArraySource, Pipeline, eval_batches, random_crop
from jaxdl.evaluation import make_evaluator
from jaxdl.loop import fit
from jaxdl.metrics import Mean
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.nonfinite import NonFiniteError
from jaxdl.objectives import regression
from jaxdl.optim import dynamic_loss_scale
from jaxdl.parallel import ShardingError, exact_step, jit_step, make_mesh, state_shardings
from jaxdl.parallel.exact import exact_problems, replica
from jaxdl.parallel.pairwise import pack, unpack
from jaxdl.paths import flatten
from tests import prove_exact, small_networks

pytestmark = pytest.mark.optimized

STEPS = 20


def mesh_of(n):
    return None if n is None else make_mesh(data=n)


@functools.cache
def trained(name, mode, axes=None, sharding="replicated"):
    """The digest after 20 steps with dropout and microbatches."""
    task = small_networks.NETWORKS[name](dropout_rate=0.1)
    step = make_train_step(task.loss_fn, task.optimizer(), trainable=task.trainable, microbatches=2)
    mesh, state = make_mesh(**dict(axes or (("data", 1),))), task.state()
    shardings = state_shardings(prove_exact.rules(sharding, state), state, mesh)
    run, log = {"exact": exact_step, "default": jit_step}[mode](step, mesh, shardings), []
    for i in range(STEPS):
        batch = {key: np.roll(value, i, axis=0) for key, value in task.data.items()}
        state, metrics = run(state, batch)
        log.append(jax.tree.leaves(jax.tree.map(float, metrics)))
    return prove_exact.digest(state, log)


@pytest.mark.parametrize(
    ("name", "axes", "sharding"),
    [
        ("mlp", (("data", 2),), "replicated"),
        ("mlp", (("data", 8),), "fsdp"),
        ("gpt", (("data", 4), ("model", 2)), "fsdp_tensor"),
    ],
)
def test_every_layout_gives_the_same_bits(name, axes, sharding):
    assert trained(name, "exact", axes, sharding) == trained(name, "exact")


@pytest.mark.proof  # prove_processes has four
def test_two_processes_give_the_same_bits():
    """Each in a process of its own, with no more devices than it needs."""
    options = ["--networks", "mlp", "--steps", "4"]
    (one, *_), (two, *_) = (prove_exact.run(layout, options) for layout in ("1 device", "2 processes"))
    assert (one["exact"], two["exact"]) == (True, True)
    assert one["hash"] == two["hash"]


def test_the_default_mode_does_not():
    """Else the test above could not fail."""
    assert trained("mlp", "default", (("data", 8),)) != trained("mlp", "default")


def test_it_is_the_same_step():
    """Without dropout, the numbers of the default mode; frozen leaves stay out."""
    task = small_networks.mlp()._replace(trainable=(("dense_0/.*", False), (".*", True)))
    step = make_train_step(task.loss_fn, task.optimizer(), trainable=task.trainable)
    mesh = make_mesh(data=2)
    shardings = state_shardings([(".*", None)], task.state(), mesh)
    ours, theirs = task.state(), task.state()
    exact, default = exact_step(step, mesh), jit_step(step, mesh, shardings)
    for _ in range(5):
        (ours, our_metrics), (theirs, their_metrics) = exact(ours, task.data), default(theirs, task.data)
    for path, leaf in flatten(jax.device_get(our_metrics)).items():
        np.testing.assert_allclose(leaf, flatten(jax.device_get(their_metrics))[path], rtol=1e-5, err_msg=path)
    for path, leaf in flatten(ours.params).items():
        np.testing.assert_allclose(leaf, flatten(theirs.params)[path], rtol=0, atol=1e-5, err_msg=path)


# ---- what it computes, by hand ----


def sum_loss_fn(params, extra, batch, rng):
    """The gradient is the sum of `x`; tells the shard's random number."""
    total = jnp.sum(params["w"] * batch["x"])
    return LossOut(total, jnp.float32(1), {"draw": Mean(jax.random.uniform(rng), jnp.float32(1))})


def pairwise(x):
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]


@pytest.mark.parametrize("n_devices", [None, 1, 2, 8])
def test_sums_are_added_in_pairs(n_devices):
    """These numbers have another sum in every other order; NumPy adds them here."""
    x = np.array([1e8, 1.5, -1e8, 3.25, 7e7, -2.0, -7e7, 0.125], np.float32)
    assert pairwise(x) != np.cumsum(x, dtype=np.float32)[-1]
    tx = optax.sgd(1.0)
    state = create_state({"w": jnp.float32(0)}, {}, tx, rng=jax.random.key(3))
    state, metrics = exact_step(make_train_step(sum_loss_fn, tx), mesh_of(n_devices))(state, {"x": x})
    assert float(state.params["w"]) == -pairwise(x) / np.float32(8)
    assert float(metrics["loss"].weight) == 8


@pytest.mark.parametrize("n_devices", [None, 4])
def test_each_shard_has_a_key_of_its_own(n_devices):
    tx = optax.sgd(1.0)
    state = create_state({"w": jnp.float32(0)}, {}, tx, rng=jax.random.key(3))
    state = state.replace(step=jnp.int32(5))
    _, metrics = exact_step(make_train_step(sum_loss_fn, tx), mesh_of(n_devices))(state, {"x": np.ones(8, np.float32)})
    step_key = jax.random.fold_in(jax.random.key(3), 5)
    draws = np.array([jax.random.uniform(jax.random.fold_in(step_key, i)) for i in range(8)])
    assert len(set(draws.tolist())) == 8
    assert float(metrics["draw"].total) == pairwise(draws)


def test_loss_scaling_divides_out():
    def loss_fn(params, extra, batch, rng):
        return LossOut(*losses.squared_error(batch["x"] * params["w"], batch["y"]))

    tx = dynamic_loss_scale(optax.sgd(0.5), initial=8.0)
    state = create_state({"w": jnp.float32(0)}, {}, tx, rng=jax.random.key(0))
    batch = {"x": np.ones(16, np.float32), "y": np.ones(16, np.float32)}
    state, metrics = exact_step(make_train_step(loss_fn, tx, microbatches=2), make_mesh(data=2))(state, batch)
    assert float(state.params["w"]) == 1.0
    assert float(metrics["loss_scale"]) == 8.0


def test_packing_is_undone():
    tree = {"a": jnp.arange(6).reshape(2, 3), "b": jnp.ones(()), "c": (jnp.zeros((0, 2)), jnp.ones(2) / 3)}
    vectors = pack(tree)
    assert {name: vector.shape for name, vector in vectors.items()} == {"int32": (1, 6), "float32": (1, 3)}
    back = unpack(vectors, jax.eval_shape(lambda: tree))
    jax.tree.map(np.testing.assert_array_equal, tree, back)


# ---- fit ----


def fitted(mesh, *, data=None, policy="stop", **options):
    task = small_networks.mlp(dropout_rate=0.1)
    step = guard(make_train_step(task.loss_fn, task.optimizer(), microbatches=2), policy)
    data = data or Pipeline(ArraySource(task.data), batch_size=16, seed=3, transforms=[random_crop(1)])
    evaluator = make_evaluator(task.loss_fn, eval_batches(ArraySource(task.data), 16))
    kept = prove_exact.Kept()
    options = {"evaluators": {"eval": evaluator}, "eval_every": 3, "exact_shards": 8, "log_every": 2} | options
    return fit(task.state(), step, data, steps=6, writers=[kept], mesh=mesh, loss_fn=task.loss_fn, **options), kept


def test_fit_gives_the_same_bits_log_and_evaluation():
    (alone, log), (spread, other) = fitted(None), fitted(make_mesh(data=8))
    assert prove_exact.digest(alone.state) == prove_exact.digest(spread.state)
    assert log.rows == other.rows
    assert len(log.rows) == 5
    assert alone.timing.compile_s > 0


def broken(policy):
    task = small_networks.mlp()
    images = task.data["image"].copy()
    images[3] = 3e38
    broken_rows = task.data | {"image": images, "weight": np.maximum(task.data["weight"], 1)}
    source = ArraySource(broken_rows)
    data = Pipeline(source, batch_size=16, shuffle=False)
    return fitted(make_mesh(data=2), data=data, policy=policy, evaluators=None)


def test_a_guarded_step_stops_and_skips_as_ever():
    with pytest.raises(NonFiniteError, match=r"rows 3"):
        broken("stop")
    result, log = broken("skip")
    assert int(result.state.step) == 6
    assert dict(log.rows[0][1:])["train/skipped"] == 1.0


def test_a_replica_is_whole_and_on_one_device():
    mesh, state = make_mesh(data=8), small_networks.mlp().state()
    spread = jax.device_put(state, state_shardings(prove_exact.rules("fsdp", state), state, mesh))
    assert prove_exact.digest(replica(spread)) == prove_exact.digest(state)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(replica(spread)))


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("n_shards", "n_devices", "rows", "parts", "message"),
    [
        (6, 2, 12, 1, "6 virtual shards are not a power of two"),
        (0, 1, 12, 1, "0 virtual shards are not a power of two"),
        (8, 3, 16, 1, "3 devices do not divide into 8 virtual shards; use 1, 2, 4, 8 devices."),
        (8, 16, 16, 1, "or 16 virtual shards from the first step on"),
        (8, 2, 12, 1, "tokens has 12 rows, which do not divide into 8 virtual shards; use a multiple of 8"),
        (8, 2, 24, 2, "8 virtual shards of microbatches=2 parts each; use a multiple of 16"),
    ],
)
def test_what_does_not_divide(n_shards, n_devices, rows, parts, message):
    (problem,) = exact_problems(n_shards, n_devices, {"tokens": rows}, parts)
    assert message in problem


def test_shards_and_rows_are_checked_before_anything_is_compiled():
    task = small_networks.mlp()
    step = make_train_step(task.loss_fn, task.optimizer())
    with pytest.raises(ShardingError, match="12 virtual shards"):
        exact_step(step, make_mesh(data=2), n_shards=12)
    with pytest.raises(ShardingError, match="image has 12 rows"):
        exact_step(step, make_mesh(data=2))(task.state(), {name: value[:12] for name, value in task.data.items()})
    with pytest.raises(JaxdlError, match=r"(?s)4 problem.*3 devices.*16 rows.*steps_per_call=2.*is_resident"):
        fitted(make_mesh(data=3), exact_shards=32, steps_per_call=2, is_resident=True)


def test_a_step_that_is_not_one_update_is_refused():
    task = small_networks.mlp()
    step = make_train_step(task.loss_fn, task.optimizer())
    for other in (repeat(step, 2), lambda state, batch: (state, {})):
        with pytest.raises(JaxdlError, match="needs a step of make_train_step"):
            exact_step(other, None)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(1, name="head")(nn.BatchNorm(use_running_average=not train, name="norm")(x))


def test_batch_norm_is_refused_unless_it_is_frozen():
    model, x = Normed(), np.ones((8, 3), np.float32)
    params, extra = init_model(model, jax.random.key(0), x)
    batch, tx = {"features": x, "target": np.ones((8, 1), np.float32)}, optax.sgd(0.1)
    for rules, is_frozen in ([(".*", True)], False), ([("head/.*", True), (".*", False)], True):
        loss_fn = make_loss_fn(model, regression(), inputs="features", train=True, trainable=rules)
        run = exact_step(make_train_step(loss_fn, tx, trainable=rules), make_mesh(data=2))
        state = create_state(params, extra, tx, rng=jax.random.key(1), trainable=rules)
        if is_frozen:
            new, _ = run(state, batch)
            np.testing.assert_array_equal(new.extra["batch_stats"]["norm"]["mean"], 0.0)
        else:
            with pytest.raises(JaxdlError, match=r"(?s)batch_stats/norm/mean.*norm='group'"):
                run(state, batch)
