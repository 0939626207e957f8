"""A frozen module freezes its statistics, through every road that a loss takes to a BatchNorm."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, LossOut, create_state, guard, losses, make_train_step, repeat
from jaxdl.finetune.statistics import freeze_statistics, frozen_statistics, module_of
from jaxdl.losses import with_compute_dtype
from jaxdl.models import ResNet
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.objectives import classification
from jaxdl.paths import flatten

HEAD = [("head/.*", True), (".*", False)]
LATE = [("(late|head)/.*", True), (".*", False)]


class Norm(nn.Module):
    """A BatchNorm that is told how to behave in the call, as a keyword or by place, or by its field."""

    told: str = "keyword"

    @nn.compact
    def __call__(self, x, train):
        if self.told == "field":
            return nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        norm = nn.BatchNorm(momentum=0.5, name="norm")
        return norm(x, not train) if self.told == "place" else norm(x, use_running_average=not train)


class Net(nn.Module):
    """Two normalized layers and a head; `wrap` lifts the early one."""

    told: str = "keyword"
    wrap: str = "none"

    @nn.compact
    def __call__(self, x, *, train=False):
        early = nn.remat(Norm, static_argnums=(2,)) if self.wrap == "remat" else Norm
        if self.wrap == "scan":
            kw = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            scanned = nn.scan(Scanned, length=2, in_axes=nn.broadcast, **kw)
            x, _ = scanned(self.told, name="early")(x, train)
        else:
            x = early(self.told, name="early")(x, train)
        x = nn.tanh(nn.Dense(4, name="dense")(x))
        x = Norm(self.told, name="late")(x, train)
        return nn.Dense(3, name="head")(x)


class Scanned(nn.Module):
    told: str

    @nn.compact
    def __call__(self, x, train):
        return Norm(self.told, name="layer")(x, train) + 0.1 * x, None


def batch_of(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(2, 3, (n, 5)).astype(np.float32), "label": rng.integers(0, 3, n).astype(np.int32)}


def parts(trainable=HEAD, model=None, **fields):
    model = model or Net(**fields)
    params, extra = init_model(model, jax.random.key(0), jnp.ones((2, 5)))
    rng = np.random.default_rng(1)  # statistics that no sum leaves exact
    extra = jax.tree.map(lambda x: jnp.float32(rng.uniform(0.1, 0.9, x.shape)), extra)
    loss_fn = make_loss_fn(model, classification(), inputs="x", train=True, trainable=trainable)
    return model, params, extra, loss_fn


def normalized(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def test_which_statistics_are_frozen():
    params = {
        "a": {"norm": {"scale": 1.0}, "dense": {"kernel": 1.0}},
        "b": {"norm": {"scale": 1.0, "bias": 1.0}, "dense": {"kernel": 1.0}},
        "c": {"dense": {"kernel": 1.0}},
        "ab": {"kernel": 1.0},
        "top": {"scale": 1.0},
        "vision": {"norm": {"scale": 1.0}},
    }
    names = ["a/norm", "b/norm", "c/norm", "c/deep/norm", "norm", "top", "ab/norm", "unknown/norm"]
    extra = {"batch_stats": {}, "n_seen": 0, "vision": {"batch_stats": {"norm": {"mean": 0.0}}}, "codes": {"top": 1}}
    for name in names:
        functools.reduce(lambda tree, part: tree.setdefault(part, {}), name.split("/"), extra["batch_stats"])[
            "mean"
        ] = 0
    trainable = [("a/dense/.*", True), ("b/norm/bias", True), ("ab/.*", True), (".*", False)]
    got = flatten(frozen_statistics(params, extra, trainable))
    assert {path for path, frozen in got.items() if frozen} == {
        "batch_stats/a/norm/mean",  # beside a layer that moves
        "batch_stats/c/norm/mean",  # no parameters of its own: its parent is frozen
        "batch_stats/c/deep/norm/mean",
        "batch_stats/top/mean",
        "vision/batch_stats/norm/mean",
    }
    assert got["batch_stats/b/norm/mean"] is False  # a part of it moves
    assert got["batch_stats/norm/mean"] is False  # its parent is the model, a part of which always moves
    assert got["codes/top"] is False  # a leaf of the model itself, in the collection `codes`
    assert module_of("batch_stats/batch_stats/mean") == "batch_stats"


@pytest.mark.parametrize("told", ["keyword", "place", "field"])
@pytest.mark.parametrize("wrap", ["none", "remat", "scan"])
def test_frozen_norms_use_their_averages_and_others_the_batch(told, wrap):
    model, params, extra, loss_fn = parts(LATE, told=told, wrap=wrap)
    batch = batch_of()
    out = loss_fn(params, extra, batch, jax.random.key(0))
    before, after = flatten(extra), flatten(out.extra)
    early = [path for path in before if "/early/" in path]
    assert len(early) == 2
    for path in before:
        assert (after[path] is before[path]) == (path in early), path

    at = jax.tree.map(np.asarray, {"early": params["early"], **{k: params[k] for k in ("dense", "late", "head")}})
    x, stats = batch["x"], jax.tree.map(np.asarray, extra["batch_stats"]["early"])
    if wrap == "scan":
        for i in range(2):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], (at["early"]["layer"]["norm"], stats["layer"]["norm"]))
            x = normalized(x, *one) + 0.1 * x
    else:
        x = normalized(x, at["early"]["norm"], stats["norm"])
    h = np.tanh(x @ at["dense"]["kernel"] + at["dense"]["bias"])
    h = normalized(h, at["late"]["norm"], {"mean": h.mean(0), "var": h.var(0)})
    logits = h @ at["head"]["kernel"] + at["head"]["bias"]
    want = losses.cross_entropy(jnp.asarray(logits), batch["label"]).total
    np.testing.assert_allclose(out.total, want, rtol=1e-5)
    plain = make_loss_fn(model, classification(), inputs="x", train=True)(params, extra, batch, jax.random.key(0))
    assert abs(float(plain.total - out.total)) > 1e-3


def test_a_module_that_is_called_again_later_behaves_as_it_was_built():
    model = nn.BatchNorm(use_running_average=False)
    outer = nn.Sequential([model, nn.Dense(3)])
    variables = outer.init(jax.random.key(0), jnp.ones((2, 5)))
    params, extra = variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss_fn(params, extra, batch, rng):
        y, changed = outer.apply({"params": params, **extra}, batch["x"], mutable=list(extra))
        return LossOut(jnp.sum(y), jnp.float32(1), {}, changed)

    frozen = freeze_statistics(loss_fn, [("layers_1/.*", True), (".*", False)])
    leaves = flatten(frozen(params, extra, batch_of(), None).extra)
    assert all(leaves[path] is leaf for path, leaf in flatten(extra).items())
    moved = flatten(loss_fn(params, extra, batch_of(), None).extra)
    assert not any(np.array_equal(moved[path], leaf) for path, leaf in flatten(extra).items())


STEPS = {
    "plain": lambda loss_fn, tx: make_train_step(loss_fn, tx, trainable=HEAD),
    "guarded": lambda loss_fn, tx: guard(make_train_step(loss_fn, tx, trainable=HEAD)),
    "skipping": lambda loss_fn, tx: guard(make_train_step(loss_fn, tx, trainable=HEAD), "skip"),
    "microbatches": lambda loss_fn, tx: make_train_step(loss_fn, tx, trainable=HEAD, microbatches=3),
    "bfloat16": lambda loss_fn, tx: make_train_step(with_compute_dtype(loss_fn, jnp.bfloat16), tx, trainable=HEAD),
}


@pytest.mark.parametrize("kind", STEPS)
def test_no_step_moves_a_bit_of_a_frozen_statistic(kind):
    _, params, extra, loss_fn = parts()
    tx = optax.adamw(0.1)
    state = create_state(params, extra, tx, rng=jax.random.key(1), trainable=HEAD)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(batch_of(seed=i) for i in range(3)))
    after, _ = jax.jit(repeat(STEPS[kind](loss_fn, tx), 3))(state, stacked)
    chex.assert_trees_all_equal(after.extra, extra)
    assert np.abs(after.params["head"]["kernel"] - params["head"]["kernel"]).max() > 0.05


@pytest.mark.parametrize("kind", STEPS)
def test_a_loss_that_was_not_told_is_refused_before_anything_is_compiled(kind):
    _, params, extra, loss_fn = parts(trainable=[(".*", True)])
    tx = optax.adamw(0.1)
    state = create_state(params, extra, tx, rng=jax.random.key(1), trainable=HEAD)
    with pytest.raises(JaxdlError) as caught:
        jax.jit(STEPS[kind](loss_fn, tx)).trace(state, batch_of())
    text = str(caught.value)
    assert "the loss changes statistics of frozen modules: 4 problem(s)" in text
    assert "batch_stats/early/norm/mean belongs to early/norm, whose parameters are frozen." in text
    assert "make_loss_fn(..., trainable=rules) or freeze_statistics(loss_fn, rules)" in text


def test_an_average_over_devices_does_not_round_them():
    """The mean of seven equal numbers is not always that number."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:7]), ("data",))
    _, params, extra, loss_fn = parts(LATE)
    values = jnp.float32(np.random.default_rng(0).uniform(size=99))
    mean = jax.shard_map(lambda x: jax.lax.pmean(x, "data"), mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    assert not np.array_equal(jax.jit(mean)(values), values)
    tx = optax.sgd(0.1)
    state = create_state(params, extra, tx, rng=jax.random.key(1), trainable=LATE)
    step = make_train_step(loss_fn, tx, trainable=LATE, axis_name="data")
    specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P()}
    after, _ = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))(state, batch_of(14))
    chex.assert_trees_all_equal(after.extra["batch_stats"]["early"], extra["batch_stats"]["early"])
    late = flatten(after.extra["batch_stats"]["late"])
    assert not any(np.array_equal(late[path], leaf) for path, leaf in flatten(extra["batch_stats"]["late"]).items())


def test_nothing_frozen_changes_nothing():
    _, params, extra, loss_fn = parts(trainable=[(".*", True)])
    out = loss_fn(params, extra, batch_of(), jax.random.key(0))
    assert not any(flatten(out.extra)[path] is leaf for path, leaf in flatten(extra).items())


@pytest.mark.parametrize("lift", [nn.remat, functools.partial(nn.vmap, variable_axes={"params": 0, "batch_stats": 0})])
def test_a_lifted_norm(lift):
    if lift is not nn.remat:
        lift = functools.partial(lift, split_rngs={"params": True}, in_axes=1, out_axes=1)
    model = nn.Sequential([lift(nn.BatchNorm)(use_running_average=False), nn.Dense(3)])
    variables = model.init(jax.random.key(0), jnp.ones((4, 2, 5)))
    params, extra = variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss_fn(params, extra, batch, rng):
        y, changed = model.apply({"params": params, **extra}, batch, mutable=list(extra))
        return LossOut(jnp.sum(y), jnp.float32(1), {}, changed)

    frozen = freeze_statistics(loss_fn, [("layers_1/.*", True), ("layers_0/.*", False)])
    batch = jnp.float32(np.random.default_rng(0).normal(3, 2, (4, 2, 5)))
    out = frozen(params, extra, batch, None)
    assert all(flatten(out.extra)[path] is leaf for path, leaf in flatten(extra).items())
    want = batch / np.sqrt(1 + 1e-5) @ params["layers_1"]["kernel"]  # averages 0 and 1
    np.testing.assert_allclose(out.total, want.sum(), rtol=1e-4)


class OwnBatchNorm(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, train=True):
        return super().__call__(x, not train)


class OwnNorm(nn.Module):
    """A norm of someone's own, whose statistics always move."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return x - x.mean(0, keepdims=True)


@pytest.mark.parametrize("own", [OwnNorm, OwnBatchNorm])
def test_a_norm_of_ones_own_is_not_silently_half_frozen(own):
    model = nn.Sequential([own(), nn.Dense(3)])
    variables = model.init(jax.random.key(0), jnp.ones((2, 5)))
    params, extra = variables["params"], {"batch_stats": variables["batch_stats"]}
    rules, tx = [("layers_1/bias", True), (".*", False)], optax.sgd(0.1)

    def loss_fn(params, extra, batch, rng):
        y, changed = model.apply({"params": params, **extra}, batch["x"], mutable=list(extra))
        return LossOut(jnp.sum(y), jnp.float32(1), {}, changed)

    params = {**params, "layers_0": params.get("layers_0", {"shift": jnp.ones(1)})}
    state = create_state(params, extra, tx, rng=jax.random.key(0), trainable=rules)
    step = make_train_step(freeze_statistics(loss_fn, rules), tx, trainable=rules)
    with pytest.raises(JaxdlError, match=r"batch_stats/layers_0/mean(.*\n)*.*A norm of your own must use its averages"):
        jax.eval_shape(step, state, batch_of())


def test_a_model_in_a_part_of_the_trees_is_refused_and_not_missed():
    """There the module's path is not the parameter's, so nothing can be intercepted; the step still notices."""
    model, params, extra, _ = parts()

    def loss_fn(params, extra, batch, rng):
        variables = {"params": params["vision"], **extra["vision"]}
        y, changed = model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return LossOut(jnp.sum(y * params["scale"]), jnp.float32(1), {}, {"vision": changed})

    rules, tx = [("scale", True), (".*", False)], optax.sgd(0.1)
    state = create_state(
        {"vision": params, "scale": jnp.ones(())}, {"vision": extra}, tx, rng=jax.random.key(0), trainable=rules
    )
    step = make_train_step(freeze_statistics(loss_fn, rules), tx, trainable=rules)
    with pytest.raises(JaxdlError, match="vision/batch_stats/early/norm/mean belongs to vision/early/norm"):
        jax.eval_shape(step, state, batch_of())


def test_rules_over_parameters_that_a_wrapper_took_away():
    """`with_adapters` outside of the loss: its rules name leaves that the loss itself does not get to see."""
    _, params, extra, loss_fn = parts(trainable=[("adapters/.*", True), ("head/.*", True), (".*", False)])
    out = loss_fn(params, extra, batch_of(), jax.random.key(0))
    assert all(flatten(out.extra)[path] is leaf for path, leaf in flatten(extra).items())


def test_every_norm_of_a_frozen_resnet():
    model = ResNet(n_outputs=3, stage_sizes=(1, 1), width=4, stem="small", norm="batch")
    params, extra = jax.eval_shape(lambda: init_model(model, jax.random.key(0), jnp.ones((2, 8, 8, 1))))
    rules = [("(head|stage_1)/.*", True), (".*", False)]
    loss_fn = make_loss_fn(model, classification(), inputs="image", train=True, trainable=rules)
    batch = {"image": jnp.ones((2, 8, 8, 1)), "label": jnp.array([0, 1])}
    kept = {}

    def trace(params, extra):
        new = flatten(loss_fn(params, extra, batch, jax.random.key(0)).extra)
        kept.update({path: new[path] is leaf for path, leaf in flatten(extra).items()})
        return 0

    jax.eval_shape(trace, params, extra)
    assert len(kept) == 12
    assert all(is_kept == ("stage_1" not in path) for path, is_kept in kept.items()), kept
