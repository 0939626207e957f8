"""Frozen means frozen: bit for bit, under everything that might move a leaf, stated by hash; and the first gradient."""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, LossOut, create_state, guard, losses, make_optimizer, make_train_step, optim, paths
from jaxdl.checkpoint import Store
from jaxdl.data import ArraySource, Pipeline
from jaxdl.finetune.contract import ContractError, Frozen
from jaxdl.finetune.presets import bitfit, freeze_embeddings, head_only, last_layers, layerwise_decay, norm_only, only
from jaxdl.loop import fit
from jaxdl.losses import with_compute_dtype
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.objectives import classification
from jaxdl.optim import eval_params, make_schedule
from jaxdl.paths import flatten
from jaxdl.zero_gradient import ZeroGradientError

HEAD = [("head/.*", True), (".*", False)]


class Words(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(11, 6, name="token")(tokens).mean(1)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = x + nn.tanh(nn.Dense(6, name="dense")(x))
        return nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)


class Net(nn.Module):
    """Every part that the presets speak of, as small as can be."""

    @nn.compact
    def __call__(self, tokens, *, train=False):
        x = Words(name="embed")(tokens)
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x, train)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="final_norm")(x))


def pipeline(n=64):
    rng = np.random.default_rng(0)
    arrays = {"tokens": rng.integers(0, 11, (n, 4)).astype(np.int32), "label": rng.integers(0, 3, n).astype(np.int32)}
    return Pipeline(ArraySource(arrays), batch_size=16, seed=0)


def start():
    params, extra = init_model(Net(), jax.random.key(0), jnp.ones((2, 4), jnp.int32))
    rng = np.random.default_rng(1)  # no leaf starts at a value that a broken update might hit by chance
    params = jax.tree.map(lambda w: w + jnp.float32(rng.normal(0, 0.1, w.shape)), params)
    return params, jax.tree.map(lambda x: jnp.float32(rng.uniform(0.1, 0.9, x.shape)), extra)


EVERY = [(".*", 1.0)]
PRESETS = {
    # name: (rules, the layers whose statistics are frozen)
    "head_only": (head_only, ["layer_0", "layer_1"]),
    "last_layers": (lambda params: last_layers(params, 1), ["layer_0"]),
    "bitfit": (bitfit, []),
    "norm_only": (norm_only, []),
    "freeze_embeddings": (freeze_embeddings, []),
    "only": (lambda params: only("head/.*", "layer_0/dense/.*"), ["layer_0", "layer_1"]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_frozen_keeps_its_bits_on_eight_devices(name):
    """AdamW or momentum with decay, L1, L2, clipping, an average, layer-wise rates and a guard, through `fit`."""
    params, extra = start()
    preset, still = PRESETS[name]
    rules = preset(params)
    own = {"b1": 0.8} if name != "last_layers" else {"momentum": 0.9}
    tx = make_optimizer(
        "adamw" if name != "last_layers" else "momentum",
        learning_rate=0.05,
        weight_decay=0.3,
        weight_decay_rules=EVERY,
        l1=1e-3,
        l1_rules=EVERY,
        l2=0.1,
        l2_rules=EVERY,
        clip_norm=1.0,
        clip_value=0.5,
        ema_decay=0.9,
        lr_scale_rules=layerwise_decay(params, 0.7, trainable=rules),
        **own,
    )
    frozen = Frozen(params, extra, rules)
    loss_fn = make_loss_fn(Net(), classification(), inputs="tokens", train=True, trainable=rules)
    result = fit(
        create_state(params, extra, tx, rng=jax.random.key(2), trainable=rules),
        guard(make_train_step(loss_fn, tx, trainable=rules)),
        pipeline(),
        steps=4,
        mesh=jax.sharding.Mesh(np.array(jax.devices()), ("data",)),
    )
    state = result.state
    assert len(state.step.sharding.device_set) == 8
    moves = flatten(paths.match(rules, params))
    averaged = flatten(eval_params(state.opt_state, state.params))
    for path, before in flatten(params).items():
        after = np.asarray(flatten(state.params)[path])
        assert np.array_equal(after, before) is not moves[path], path
        assert moves[path] or np.array_equal(averaged[path], before), path
        assert any(leaf.endswith(path) for leaf in flatten(state.opt_state)) is moves[path], path
    for path, before in flatten(extra).items():
        is_frozen = any(f"/{layer}/" in path for layer in still)
        assert np.array_equal(flatten(state.extra)[path], before) is is_frozen, path
    n = sum(not moving for moving in moves.values()) + 2 * len(still)
    assert frozen.check(state.params, state.extra).startswith(f"{n} lea")


def test_the_statement_is_of_hashes():
    kernel, mean = np.arange(6, dtype=np.float32).reshape(2, 3), np.float32([0.5])
    params = {"body": {"kernel": kernel}, "head": {"kernel": np.ones(2, np.float32)}}
    extra = {"batch_stats": {"body": {"norm": {"mean": mean}}, "head": {"mean": mean}}}
    frozen = Frozen(params, extra, HEAD)
    want = {
        "params/body/kernel": hashlib.sha256(b"float32[2, 3]" + kernel.tobytes()).hexdigest(),
        "extra/batch_stats/body/norm/mean": hashlib.sha256(b"float32[1]" + mean.tobytes()).hexdigest(),
    }
    assert frozen.hashes == want
    assert frozen.n_bytes == 28
    listed = "\n".join(f"{path} {want[path]}" for path in sorted(want))
    assert frozen.digest == hashlib.sha256(listed.encode()).hexdigest()
    said = frozen.check(params, extra)
    assert said == f"2 leaves, 28 bytes: bit-identical to the base (sha256 {frozen.digest[:12]})"
    assert Frozen(params, extra, [(".*", True)]).check(params, extra).startswith("0 leaves, 0 bytes")


def test_every_leaf_that_changed_is_named():
    params = {
        "body": {"kernel": jnp.ones((2, 2)), "codes": jnp.arange(4), "half": jnp.ones(2, jnp.bfloat16)},
        "key": jax.random.key(3),
        "head": {"kernel": jnp.ones(2)},
    }
    frozen = Frozen(params, {}, HEAD)
    moved = {**params, "head": {"kernel": jnp.zeros(2)}, "adapters": {"a": jnp.ones(1)}}
    assert frozen.check(moved, {}).startswith("4 leaves")
    replicated = jax.device_put(params, jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P()))
    assert frozen.check(replicated, {}) == frozen.check(params, {})
    body = {"kernel": -params["body"]["kernel"] * -1.0000001, "codes": jnp.int8([0, 1, 2, 3]), "halt": jnp.ones(2)}
    with pytest.raises(ContractError) as caught:
        frozen.check({**params, "body": body, "key": jax.random.key(4)}, {})
    text = str(caught.value)
    assert "frozen leaves are not those of the base: 4 problem(s)" in text
    assert "params/body/kernel: float32[2,2] with sha256" in text
    assert "params/body/codes: int8[4] with sha256" in text
    assert "was int32[4] with sha256" in text
    assert "params/body/half is missing; nearest: params/body/halt" in text
    assert "params/key: key<fry>[] with" in text
    assert caught.value.exit_code == 1


def test_a_negative_zero_is_another_bit():
    frozen = Frozen({"body": np.float32([0.0]), "head": np.float32([1.0])}, {}, [("head", True), ("body", False)])
    with pytest.raises(ContractError, match="params/body"):
        frozen.check({"body": np.float32([-0.0]), "head": np.float32([1.0])}, {})


# The first gradient.


def linear(loss_of):
    """A loss of `head * body * x` against `x`, for rows of one number."""

    def loss_fn(params, extra, batch, rng):
        return LossOut(*losses.squared_error(loss_of(params, batch["x"]), 3 * batch["x"], batch.get("weight")))

    return loss_fn


def numbers(**more):
    return Pipeline(ArraySource({"x": np.ones(32, np.float32), **more}), batch_size=8, seed=0)


def train(loss, *, tx=None, trainable=HEAD, params=None, data=None, steps=3, wrap=guard, **options):
    tx = tx or optax.sgd(0.1)
    params = params or {"body": {"w": jnp.ones(())}, "head": {"w": jnp.ones(())}}
    state = create_state(params, {}, tx, rng=jax.random.key(0), trainable=trainable)
    step = wrap(make_train_step(loss, tx, trainable=trainable))
    return fit(state, step, data or numbers(), steps=steps, **options)


DETACHED = linear(lambda params, x: params["body"]["w"] * jax.lax.stop_gradient(params["head"]["w"]) * x)
JOINED = linear(lambda params, x: params["body"]["w"] * params["head"]["w"] * x)


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 3}, {"is_resident": False}])
def test_a_first_gradient_of_zero_is_refused_with_what_trains_and_what_the_loss_reaches(options):
    with pytest.raises(ZeroGradientError) as caught:
        train(DETACHED, loss_fn=DETACHED, **options)
    text = str(caught.value)
    assert "the gradient of the first step is exactly 0, so nothing trains." in text
    assert "trainable: head/w\n" in text
    assert "the loss reaches body/w\n" in text
    assert "stop_gradient" in text
    assert caught.value.exit_code == 1


def test_it_is_refused_without_the_loss_and_without_the_rules():
    with pytest.raises(ZeroGradientError, match="trainable: head/w\n  Likely causes"):
        train(DETACHED)
    with pytest.raises(ZeroGradientError, match=r"nothing trains\.\n  Likely causes"):
        train(DETACHED, wrap=lambda step: lambda state, batch: step(state, batch))


def test_frozen_zeros_between_the_loss_and_what_trains():
    params = {"body": {"w": jnp.ones(())}, "head": {"w": jnp.zeros(())}}
    with pytest.raises(ZeroGradientError, match="trainable: body/w\n  - the loss reaches head/w\n"):
        train(JOINED, params=params, trainable=[("body/.*", True), (".*", False)], loss_fn=JOINED)
    assert int(train(JOINED, params=params, trainable=[(".*", True)]).state.step) == 3


def test_rows_that_weigh_nothing():
    data = numbers(weight=np.zeros(32, np.float32))
    with pytest.raises(ZeroGradientError, match=r"the first batch has the weight 0.*\n.*no parameter at all"):
        train(JOINED, data=data, loss_fn=JOINED)


def test_a_warm_up_from_a_rate_of_zero_is_no_error():
    rate = make_schedule("linear", peak=0.1, steps=8, warmup_steps=4, end=0.0)
    assert float(rate(0)) == 0.0
    result = train(JOINED, tx=make_optimizer("adamw", learning_rate=rate))
    assert int(result.state.step) == 3
    assert float(result.state.params["head"]["w"]) != 1.0


def test_a_skipped_first_step_is_no_error():
    data = Pipeline(ArraySource({"x": np.float32([1e30, *np.ones(31)])}), batch_size=32, seed=0)
    assert int(train(JOINED, data=data, wrap=lambda step: guard(step, "skip")).state.step) == 3


def test_an_overflow_of_float16_is_no_error_and_counts_as_skipped():
    tx = optim.dynamic_loss_scale(optax.sgd(0.1), initial=2.0**40)
    half = with_compute_dtype(JOINED, jnp.float16)
    for wrap in (guard, lambda step: guard(step, "skip")):
        result = train(half, tx=tx, wrap=wrap)
        assert float(optim.loss_scale_of(result.state.opt_state)) < 2.0**39
    state = create_state({"body": {"w": jnp.ones(())}, "head": {"w": jnp.ones(())}}, {}, tx, rng=jax.random.key(0))
    for wrap in (lambda step: step, lambda step: guard(step, "skip")):
        _, metrics = jax.jit(wrap(make_train_step(half, tx)))(state, numbers()[0])
        assert (float(metrics["grad_norm"]), float(metrics["skipped"].finish())) == (0.0, 1.0)


def test_zero_under_loss_scaling_is_refused():
    tx = optim.dynamic_loss_scale(optax.sgd(0.1), initial=8.0)
    with pytest.raises(ZeroGradientError):
        train(with_compute_dtype(DETACHED, jnp.float16), tx=tx)


def test_only_the_first_step_of_a_run_is_looked_at(tmp_path):
    """A run that goes on, from a checkpoint or from a state, may stand where nothing is left to learn."""
    solved = {"body": {"w": jnp.ones(())}, "head": {"w": jnp.float32(3.0)}}
    with pytest.raises(ZeroGradientError):
        train(JOINED, params=solved)
    tx = optax.sgd(0.1)
    with Store(tmp_path) as store:
        state = create_state(solved, {}, tx, rng=jax.random.key(0), trainable=HEAD).replace(step=jnp.int32(2))
        store.save(2, state)
        store.wait()
        assert int(train(JOINED, store=store, steps=4).state.step) == 4
    step = make_train_step(JOINED, tx, trainable=HEAD)
    assert int(fit(state, step, numbers(), steps=4).state.step) == 4


def test_a_wrapped_step_still_knows_what_trains():
    step = make_train_step(JOINED, optax.sgd(0.1), trainable=HEAD)
    for policy in ("stop", "skip"):
        assert guard(step, policy).trainable == HEAD


def test_integers_may_be_frozen_and_not_trained():
    """A quantised base: codes take part in the loss and in the state, and no gradient reaches them."""
    params = {"body": {"codes": jnp.int8([2, -3])}, "head": {"w": jnp.ones(2)}}
    loss_fn = linear(lambda params, x: (params["body"]["codes"] * params["head"]["w"]).sum() * x)
    result = train(loss_fn, params=params, tx=make_optimizer("adamw", learning_rate=0.1, weight_decay=0.1))
    assert result.state.params["body"]["codes"].dtype == jnp.int8
    np.testing.assert_array_equal(result.state.params["body"]["codes"], [2, -3])
    with pytest.raises(JaxdlError, match=r"body/codes.*freeze them"):
        train(loss_fn, params=params, trainable=[(".*", True)])
