"""Adapters of all kinds: what a step moves and costs, what is never read, several kinds at once, generation."""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import create_state, make_train_step
from jaxdl.finetune import lora
from jaxdl.finetune.adapters import AdaptedModel, AdapterError, adapted, add, with_adapters
from jaxdl.finetune.bottleneck import Bottleneck
from jaxdl.finetune.lora import Lora
from jaxdl.finetune.prompts import Slots
from jaxdl.finetune.sites import survey
from jaxdl.generate import generate
from jaxdl.losses import LossOut, with_compute_dtype
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.objectives import classification
from jaxdl.optim import make_optimizer
from jaxdl.paths import flatten

KEY = jax.random.key(0)
X = jnp.ones((2, 4))
ONLY_ADAPTERS = [("adapters/.*", True), (".*", False)]
ATTENTION = [(".*attention/.*kernel", 8), (".*", None)]


def bert(width, **fields):
    block = bert_block(width, 2, 4 * width, dropout_rate=0.0, attention_dropout_rate=0.0)
    sizes = {"n_layers": 2, "vocab_size": 20, "n_positions": 32, "head": "classify", "n_outputs": 3}
    return Bert(block, **{**sizes, **fields})


def batch_of(n_rows, n_tokens):
    tokens = np.random.default_rng(0).integers(1, 20, (n_rows, n_tokens)).astype(np.int32)
    return {"tokens": tokens, "label": (np.arange(n_rows) % 3).astype(np.int32)}


def moved(adapters):
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(1.7 * jnp.arange(x.size)).reshape(x.shape), adapters)


def test_a_step_moves_adapters_and_no_bit_of_the_base():
    model, batch = bert(8), batch_of(6, 4)
    settings = Lora([(".*attention/.*kernel", 2), (".*", None)], dropout_rate=0.1)
    base, extra = init_model(model, KEY, batch["tokens"])
    params = lora.add(KEY, base, settings, model, batch["tokens"])
    every = [(".*", True)]
    tx = make_optimizer(
        learning_rate=0.1, weight_decay=0.1, weight_decay_rules=every, l1=0.1, l1_rules=every, clip_norm=1.0
    )
    loss_fn = with_adapters(make_loss_fn(model, classification(), inputs="tokens", train=True), settings)
    state = create_state(params, extra, tx, rng=KEY, trainable=ONLY_ADAPTERS)
    step = jax.jit(make_train_step(loss_fn, tx, trainable=ONLY_ADAPTERS, microbatches=2))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].finish())
    assert losses[-1] < losses[0]
    assert state.extra == {}
    moments = [path for path, leaf in flatten(state.opt_state).items() if leaf.ndim]
    assert len(moments) == 2 * len(flatten(params["adapters"]))
    assert all("/adapters/" in path for path in moments)
    before, after = flatten(params), flatten(state.params)
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        assert np.array_equal(leaf, before[path]) != path.startswith("adapters/"), path


def test_a_step_costs_at_most_three_quarters():
    model, batch = bert(128, head="classify"), batch_of(8, 32)
    base, extra = jax.eval_shape(functools.partial(init_model, model), KEY, batch["tokens"])
    settings, tx = Lora(ATTENTION), make_optimizer("sgd", learning_rate=0.1)
    loss_fn = make_loss_fn(model, classification(), inputs="tokens", train=True)

    def flops(params, loss_fn, trainable):
        make_state = functools.partial(create_state, tx=tx, rng=KEY, trainable=trainable)
        state = jax.eval_shape(lambda params, extra: make_state(params, extra), params, extra)
        step = jax.jit(make_train_step(loss_fn, tx, trainable=trainable))
        return step.lower(state, batch).compile().cost_analysis()["flops"]

    params = jax.eval_shape(lambda key, base: lora.add(key, base, settings, model, batch["tokens"]), KEY, base)
    low = flops(params, with_adapters(loss_fn, settings), ONLY_ADAPTERS)
    full = flops(base, loss_fn, [(".*", True)])
    assert 0.5 * full < low <= 0.75 * full


KINDS = (
    Slots(2, first_id=200, has_prompt=True, prefix=[(".*layer_1/attention/(key|value)", True), (".*", False)]),
    Bottleneck([(".*/(attention/output|mlp/down)", 3), (".*", None)]),
    Lora([("encoder/.*kernel", 2), (".*", None)]),
)


def test_the_kinds_live_together_and_each_leaf_has_a_gradient():
    model, tokens = bert(8), jnp.array([[1, 200, 201, 5], [2, 3, 200, 201]])
    base, _ = init_model(model, KEY, jnp.ones((1, 4), jnp.int32))
    params = add(KEY, base, KINDS, model, tokens)
    names = {path.rsplit("/", 1)[1] for path in flatten(params["adapters"])}
    assert names == {"a", "b", "down_kernel", "down_bias", "up_kernel", "up_bias", "prompt", "prefix"}
    params = {**params, "adapters": moved(params["adapters"])}

    def loss(adapters, tokens, kinds):
        y = adapted(model.apply, kinds)({"params": {**params, "adapters": adapters}}, tokens)
        return (y * jnp.arange(3.0).reshape(1, 3)).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    (one, grads), (two, others) = (gradient(params["adapters"], tokens, kinds) for kinds in (KINDS, KINDS[::-1]))
    assert one == two
    for path, leaf in flatten(grads).items():
        assert np.abs(leaf).max() > 1e-6, path
    jax.tree.map(np.testing.assert_array_equal, grads, others)


class Net(nn.Module):
    """A convolution, batch statistics, and a head that a call may leave out."""

    @nn.compact
    def __call__(self, x, *, train=False, has_head=True):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="body")(x))
        return nn.Dense(3, name="head")(x) if has_head or self.is_initializing() else x


BODY = Lora([("body/kernel", 2), (".*", None)])
BOTH = Lora([(".*kernel", 2)])


def net(settings):
    base, extra = init_model(Net(), KEY, X)
    return add(KEY, base, settings, Net(), X), extra


def test_extra_stays_that_of_the_base():
    params, extra = net(BODY)
    loss_fn = with_adapters(make_loss_fn(Net(), classification(), inputs="x", train=True), BODY)
    batch = {"x": X, "label": jnp.array([0, 1])}
    for loss in (loss_fn, with_compute_dtype(loss_fn, jnp.bfloat16)):
        out = loss(params, extra, batch, KEY)
        assert jax.tree.structure(out.extra) == jax.tree.structure(extra)
    assert not np.array_equal(out.extra["batch_stats"]["norm"]["mean"], extra["batch_stats"]["norm"]["mean"])


def test_an_adapter_that_is_never_read_is_told():
    params, extra = net(BOTH)
    plain, jitted = Net().apply, jax.jit(Net().apply)

    def loss_fn(params, extra, batch, rng, apply=plain, **kw):
        return LossOut(apply({"params": params, **extra}, batch, **kw).sum(), jnp.float32(1))

    def run(loss_fn):
        return jax.jit(with_adapters(loss_fn, BOTH))(params, extra, X, KEY)

    assert run(loss_fn).weight == 1
    with pytest.raises(AdapterError, match=r"(?s)never read: 2 problem.*adapters/head/a \(read: body/a, body/b\)"):
        run(functools.partial(loss_fn, has_head=False))
    with pytest.raises(AdapterError, match=r"never read: 4 problem"):
        run(lambda params, extra, batch, rng: loss_fn(params, {"batch_stats": extra["batch_stats"]}, batch, rng))
    run(functools.partial(loss_fn, apply=jitted))
    with pytest.raises(AdapterError, match=r"(?s)never read: 4 problem.*outside of a jit of its own"):
        run(functools.partial(loss_fn, apply=jitted))
    with pytest.raises(AdapterError, match="never read: 2 problem"):
        adapted(Net().apply, BOTH)({"params": params, **extra}, X, has_head=False)


def test_a_part_of_the_model_need_not_read_all():
    model = GPT2(gpt2_block(width=8, n_heads=2), n_layers=1, vocab_size=11, n_positions=8)
    settings, tokens = Lora([("(decoder|embed)/.*", 2)]), jnp.array([[1, 2]])
    params = add(KEY, init_model(model, KEY, tokens)[0], settings, model, tokens)
    apply = adapted(model.apply, settings)
    hidden = apply({"params": params}, tokens, method="hidden")
    logits = apply({"params": params}, hidden, method="logits")
    np.testing.assert_array_equal(logits, apply({"params": params}, tokens))


def test_what_add_refuses():
    model, base = nn.Dense(3), {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    params = add(KEY, base, Lora([(".*", 1)]), model, X)
    with pytest.raises(AdapterError, match="params already have 'adapters'; give all kinds to one call of add"):
        add(KEY, params, Lora([(".*", 1)]), model, X)
    with pytest.raises(AdapterError, match="params lack kernel, which the model has; nearest: kernle, bias"):
        add(KEY, {"kernle": base["kernel"], "bias": base["bias"]}, Lora([(".*", 1)]), model, X)
    with pytest.raises(AdapterError, match="settings hold Lora twice"):
        add(KEY, base, [Lora([(".*", 1)]), Lora([(".*", 2)])], model, X)
    embed, both = nn.Embed(4, 4), [Lora([(".*", 5)]), Slots(2, first_id=1, table="")]
    with pytest.raises(AdapterError, match=r"(?s)add: 2 problem.*embedding has rank 4 at most.*first_id=1"):
        add(KEY, {"embedding": jnp.ones((4, 4))}, both, embed, jnp.ones((1, 2), jnp.int32))


def test_adapters_and_settings_go_together():
    params, extra = net(BOTH)
    with pytest.raises(AdapterError, match="params have no 'adapters'"):
        adapted(Net().apply, BOTH)({"params": {"body": params["body"]}, **extra}, X)
    with pytest.raises(AdapterError, match=r"(?s)4 problem.*adapters/body/a is of no kind in settings \(Bottleneck\)"):
        adapted(Net().apply, Bottleneck([(".*", 1)]))({"params": params, **extra}, X)
    base = {name: tree for name, tree in params.items() if name != "adapters"}
    np.testing.assert_array_equal(
        adapted(Net().apply, ())({"params": base, **extra}, X), Net().apply({"params": base, **extra}, X)
    )


def test_generation_is_that_of_the_merged_model():
    model = GPT2(gpt2_block(width=8, n_heads=2, init_std=0.5), n_layers=2, vocab_size=11, n_positions=32)
    settings, prompts = Lora([(".*", 2)]), [[1, 2, 3], [4]]
    params = add(KEY, init_model(model, KEY, jnp.ones((1, 2), jnp.int32))[0], settings, model, jnp.array([[1, 2]]))
    params = {**params, "adapters": jax.tree.map(lambda x: 5 * x, moved(params["adapters"]))}
    base = {name: tree for name, tree in params.items() if name != "adapters"}
    found = generate(AdaptedModel(model, settings), params, prompts, max_new_tokens=6)
    assert found == generate(model, lora.merge(params, settings), prompts, max_new_tokens=6)
    assert found != generate(model, base, prompts, max_new_tokens=6)


def test_an_adapted_model_is_a_value():
    one, two = (AdaptedModel(nn.Dense(3), Lora([(".*", 2)])) for _ in range(2))
    assert one == two == copy.deepcopy(one)
    assert hash(one) == hash(two)
    assert one.slot_ids == range(0)
    with pytest.raises(AttributeError):
        one.vocab_size  # noqa: B018


def test_a_survey_knows_stacked_axes_and_outputs():
    model = GPT2(gpt2_block(width=8, n_heads=2), n_layers=3, vocab_size=11, n_positions=8, layout="scanned")
    found = survey(model, jax.ShapeDtypeStruct((2, 4), jnp.int32), train=False)
    up = found.sites["decoder/layers/mlp/up"]
    assert (up.inputs, up.outputs, up.stack, up.output.shape) == ((8,), (32,), (3,), (2, 4, 32))
    assert found.sites["decoder"].output is None
    assert found.sites["decoder"].stack == ()
    assert found.leaves["decoder/layers/mlp/up/kernel"].shape == (3, 8, 32)
