"""Low-rank adapters: nothing at the start, merged equals beside, gradients by hand, sums of several, refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import paths
from jaxdl.finetune import lora
from jaxdl.finetune.adapters import AdapterError, adapted
from jaxdl.finetune.lora import Lora
from jaxdl.finetune.quantize import quantize
from jaxdl.finetune.sites import nest
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.transformer import stack_layers, unstack_layers

KEY = jax.random.key(0)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
X = jax.random.normal(jax.random.key(9), (2, 6, 4))
IMAGES = jax.random.normal(jax.random.key(8), (2, 7, 7, 3))
ALL = [(".*", 2)]


def gpt2(**fields):
    """Tied logits, adapters everywhere."""
    block = gpt2_block(width=8, n_heads=2, init_std=0.4)
    return GPT2(block, n_layers=2, vocab_size=11, n_positions=8, **{"layout": "unrolled", **fields})


MODELS = {
    "dense": (nn.Dense(5), X),
    "no_bias": (nn.Dense(5, use_bias=False), X),
    "two_inputs": (nn.DenseGeneral((3, 2), axis=(-2, -1)), X),
    "an_input_within": (nn.DenseGeneral(5, axis=1), X),
    "attention": (nn.MultiHeadDotProductAttention(2, qkv_features=8), X),
    "conv": (nn.Conv(4, (3, 3), strides=2, padding="SAME"), IMAGES),
    "dilated": (nn.Conv(4, (3,), kernel_dilation=2, padding="CIRCULAR"), X),
    "embed": (nn.Embed(9, 4), TOKENS),
    "tied": (gpt2(), TOKENS),
    "scanned": (gpt2(layout="scanned"), TOKENS),
}


def make(model, x, settings):
    base = jax.tree.map(_cosines, jax.eval_shape(model.init, KEY, x)["params"])
    return base, lora.add(jax.random.key(1), base, settings, model, x)


def _cosines(leaf):
    return jnp.asarray(0.5 * np.cos(1.3 * np.arange(leaf.size) + leaf.ndim).reshape(leaf.shape), jnp.float32)


def train(params):
    """Every adapter leaf, so also the zeros, somewhere else."""
    return {**params, "adapters": jax.tree.map(lambda x: np.asarray(x) + 0.2 * _cosines(x), params["adapters"])}


@functools.cache
def compiled(model, settings=None):
    apply = model.apply if settings is None else adapted(model.apply, settings)
    return jax.jit(lambda params, x, rngs: apply({"params": params}, x, rngs=rngs))


def run(model, params, x, settings=None, rngs=None):
    return compiled(model, settings)(params, x, rngs)


@pytest.mark.parametrize("name", MODELS)
def test_fresh_adapters_change_no_bit(name):
    model, x = MODELS[name]
    base, params = make(model, x, Lora(ALL))
    assert {name: tree for name, tree in params.items() if name != "adapters"} == base
    np.testing.assert_array_equal(run(model, params, x, Lora(ALL)), run(model, base, x))


DORA = {"has_magnitude": True}
MERGED = [*((name, {}) for name in MODELS), ("dense", {"is_rank_stabilized": True})]
MERGED += [(name, DORA) for name in MODELS if name not in ("embed", "tied")]


@pytest.mark.parametrize(("name", "fields"), MERGED, ids=str)
def test_merged_is_beside(name, fields):
    model, x = MODELS[name]
    rules = [(".*kernel", 2), (".*embedding", None)] if fields == DORA and name == "scanned" else ALL
    settings = Lora(rules, alpha=3.0, **fields)
    base, params = make(model, x, settings)
    params = train(params)
    beside = run(model, params, x, settings)
    merged = lora.merge(params, settings)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(run(model, merged, x), beside, rtol=2e-5, atol=2e-5)
    assert np.abs(beside - run(model, base, x)).max() > 0.01


@pytest.mark.parametrize("fields", [{"remat": "full"}, {"layout": "scanned", "remat": "full"}], ids=str)
def test_scanned_and_remat_are_the_plain_model(fields):
    settings, is_scanned = Lora(ALL), "layout" in fields
    _, params = make(gpt2(), TOKENS, settings)
    params = train(params)
    stacked = stack_layers(params) if is_scanned else params
    assert ("layers" in stacked["adapters"]["decoder"]) == is_scanned

    def value_and_gradient(model, params):
        def loss(params):
            y = adapted(model.apply, settings)({"params": params}, TOKENS)
            return y[..., 3].sum(), y

        (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return y, unstack_layers(gradient)

    one, two = value_and_gradient(gpt2(), params), value_and_gradient(gpt2(**fields), stacked)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), one, two)


def test_scanned_adapters_have_the_layers_axis():
    _, params = make(gpt2(layout="scanned"), TOKENS, Lora([(".*query/kernel", 3), (".*", None)], has_magnitude=True))
    shapes = jax.tree.map(jnp.shape, params["adapters"]["decoder"]["layers"]["attention"]["query"])
    assert shapes == {"a": (2, 8, 3), "b": (2, 3, 8), "magnitude": (2, 8)}


def test_gradients_are_those_of_the_formula():
    settings, model = Lora(ALL, alpha=3.0), nn.Dense(5)
    _, params = make(model, X, settings)
    params, c = train(params), jax.random.normal(jax.random.key(3), (2, 6, 5))
    found = jax.grad(lambda params: (run(model, params, X, settings) * c).sum())(params)["adapters"]
    x, dy, a, b = (np.asarray(part, np.float64) for part in (X, c, params["adapters"]["a"], params["adapters"]["b"]))
    x, dy = x.reshape(-1, 4), dy.reshape(-1, 5)
    np.testing.assert_allclose(found["a"], 1.5 * x.T @ dy @ b.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["b"], 1.5 * a.T @ x.T @ dy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tied"])
def test_gradients_are_those_through_the_merged_model(name):
    model, x = MODELS[name]
    settings = Lora(ALL, alpha=3.0)
    _, params = make(model, x, settings)
    params = train(params)
    weight = jnp.cos(jnp.arange(run(model, params, x, settings).size))

    def loss(adapters, is_merged):
        full = {**params, "adapters": adapters}
        y = run(model, lora.merge(full, settings), x) if is_merged else run(model, full, x, settings)
        return jnp.dot(y.ravel(), weight)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    beside, merged = (gradient(params["adapters"], is_merged) for is_merged in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), beside, merged)


def test_doras_gradient_takes_the_length_for_a_constant():
    settings, model = Lora(ALL, has_magnitude=True), nn.Dense(5, use_bias=False)
    base, params = make(model, X, settings)
    params = train(params)
    adapters, weight = params["adapters"], jnp.cos(jnp.arange(60.0)).reshape(2, 6, 5)
    v = base["kernel"] + 8.0 * adapters["a"] @ adapters["b"]
    length = np.sqrt((np.asarray(v, np.float64) ** 2).sum(0))

    def by_hand(adapters):
        ratio = (adapters["magnitude"] / length.astype(np.float32)).reshape(1, 5)
        kernel = ratio * (base["kernel"] + 8.0 * adapters["a"] @ adapters["b"])
        return (weight * (X @ kernel)).sum()

    found = jax.grad(lambda params: (run(model, params, X, settings) * weight).sum())(params)["adapters"]
    expected = jax.grad(by_hand)(adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, expected)


def test_dora_begins_with_the_lengths_and_survives_a_column_of_zeros():
    settings, model = Lora(ALL, has_magnitude=True), nn.Dense(5)
    base = {"kernel": jnp.arange(20.0).reshape(4, 5).at[:, 2].set(0), "bias": jnp.arange(5.0)}
    params = lora.add(KEY, base, settings, model, X)
    np.testing.assert_allclose(params["adapters"]["magnitude"][1], np.sqrt(1 + 36 + 121 + 256), rtol=1e-6)
    np.testing.assert_allclose(run(model, params, X, settings), run(model, base, X), rtol=1e-5, atol=1e-5)


def test_dropout_falls_on_the_branch_alone():
    settings, model = Lora([("kernel", 4)], alpha=4.0, dropout_rate=0.5), nn.Dense(4, use_bias=False)
    x = jnp.ones((400, 4))
    params = {"kernel": jnp.zeros((4, 4)), "adapters": {"a": jnp.eye(4), "b": jnp.eye(4)}}
    np.testing.assert_array_equal(run(model, params, x, settings), x)
    y = run(model, params, x, settings, {"dropout": jax.random.key(2)})
    assert set(np.unique(y)) == {0.0, 2.0}
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.1)
    frozen = {**params, "kernel": jnp.eye(4), "adapters": {"a": jnp.eye(4), "b": jnp.zeros((4, 4))}}
    np.testing.assert_array_equal(run(model, frozen, x, settings, {"dropout": jax.random.key(2)}), x)


class Layers(nn.Module):
    """Two layers on the same input, scanned by its user."""

    axes: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, x):
        def body(dense, x):
            return x, dense(x)

        axes, split = dict(self.axes), {"params": True, "dropout": True}
        scan = nn.scan(body, variable_axes=axes, split_rngs=split, length=2)
        return scan(nn.Dense(4, use_bias=False, name="dense"), x)[1]


def test_scanned_layers_drop_differently():
    settings, x = Lora([("dense/kernel", 4)], alpha=4.0, dropout_rate=0.5), jnp.ones((9, 4))
    eyes = jnp.stack([jnp.eye(4)] * 2)
    params = {"dense": {"kernel": 0 * eyes}, "adapters": {"dense": {"a": eyes, "b": eyes}}}
    model = Layers((("params", 0), ("adapters", 0)))
    one, two = run(model, params, x, settings, {"dropout": jax.random.key(2)})
    assert set(np.unique(one)) == {0.0, 2.0}
    assert not np.array_equal(one, two)


def test_a_scan_that_does_not_hand_adapters_on_is_told():
    settings, model, x = Lora([("dense/kernel", 1)]), Layers((("params", 0),)), jnp.ones((9, 4))
    _, params = make(model, x, settings)
    assert params["adapters"]["dense"]["a"].shape == (2, 4, 1)
    with pytest.raises(AdapterError, match=r"(?s)2 problem.*adapters/dense/a .*variable_axes={'adapters': 0}"):
        run(model, params, x, settings)


def test_the_branch_has_the_dtype_of_the_module():
    settings, model = Lora(ALL), nn.Dense(5, dtype=jnp.bfloat16)
    _, params = make(model, X, settings)
    params = train(params)
    assert params["adapters"]["a"].dtype == jnp.float32
    y = run(model, params, X, settings)
    assert y.dtype == jnp.bfloat16
    wide = run(nn.Dense(5), params, X, settings)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=0.05, atol=0.05)
    half = lora.merge({**params, "kernel": params["kernel"].astype(jnp.bfloat16)}, settings)
    assert half["kernel"].dtype == jnp.bfloat16


def test_a_draw_depends_on_the_path_alone_and_has_pefts_spread():
    model, x = nn.MultiHeadDotProductAttention(4, qkv_features=64), jnp.ones((1, 2, 100))
    base = model.init(KEY, x)["params"]
    one = lora.add(KEY, base, Lora([("query/kernel", 8), (".*", None)]), model, x)["adapters"]
    two = lora.add(KEY, base, Lora([("(query|key)/kernel", 8), (".*", None)]), model, x)["adapters"]
    np.testing.assert_array_equal(one["query"]["a"], two["query"]["a"])
    a = np.asarray(two["key"]["a"])
    assert not np.array_equal(a, two["query"]["a"])
    assert np.abs(a).max() <= 0.1
    np.testing.assert_allclose(a.std(), 0.1 / np.sqrt(3), rtol=0.05)


def test_combined_is_the_sum_of_the_branches():
    model = gpt2()
    everywhere = Lora(ALL, alpha=3.0)
    attention = Lora([(".*query/kernel", 3), (".*", None)], alpha=2.0, is_rank_stabilized=True)
    base, params = make(model, TOKENS, everywhere)
    one, two = train(params), train(lora.add(jax.random.key(5), base, attention, model, TOKENS))
    adapters, settings = lora.combine([(one["adapters"], everywhere, 0.5), (two["adapters"], attention, -1.5)])
    assert adapters["decoder"]["layer_1"]["attention"]["query"]["a"].shape == (8, 5)
    merged = paths.flatten(lora.merge({**base, "adapters": adapters}, settings))
    flat = [paths.flatten(tree) for tree in (base, lora.merge(one, everywhere), lora.merge(two, attention))]
    for path, leaf in merged.items():
        w, first, second = (tree[path] for tree in flat)
        np.testing.assert_allclose(leaf, w + 0.5 * (first - w) - 1.5 * (second - w), rtol=1e-5, atol=1e-5)
    beside = run(model, {**base, "adapters": adapters}, TOKENS, settings)
    np.testing.assert_allclose(beside, run(model, nest(merged), TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_base", [False, True])
def test_combined_stacked_layers(has_base):
    model, settings = gpt2(layout="scanned"), Lora([(".*query/kernel", 2 if has_base else 3), (".*", None)])
    base, params = make(model, TOKENS, settings)
    part = (train(params)["adapters"], settings, 0.5)
    adapters, new = lora.combine([part, part], **({"base": base} if has_base else {}))
    assert adapters["decoder"]["layers"]["attention"]["query"]["b"].shape == (2, 4 if has_base else 6, 8)
    expected = run(model, train(params), TOKENS, settings)
    np.testing.assert_allclose(run(model, {**base, "adapters": adapters}, TOKENS, new), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_combined():
    model, settings = gpt2(layout="scanned"), Lora([(".*query/kernel", 2), (".*", None)])
    _, params = make(model, TOKENS, settings)
    with pytest.raises(AdapterError, match="query has as many stacked layers as its rank; give base"):
        lora.combine([(params["adapters"], settings, 1.0)])
    dense, other = ({"a": jnp.ones((n, 1)), "b": jnp.ones((1, 2))} for n in (3, 4))
    with pytest.raises(AdapterError, match=r"has shapes of different modules: a \(3, 1\), b \(1, 2\); a \(4, 1\)"):
        lora.combine([(dense, settings, 1.0), (other, settings, 1.0)])
    with pytest.raises(AdapterError, match=r"(?s)2 problem.*one is DoRA.*two has the leaves"):
        lora.combine([({"one": {**dense, "magnitude": jnp.ones(2)}, "two": {"prompt": jnp.ones(2)}}, settings, 1.0)])
    with pytest.raises(AdapterError, match="there are no adapters"):
        lora.combine([])


class Odd(nn.Module):
    """What cannot be adapted, each kind once, and one that can."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(4, name="fine")(x)) + self.param("row", nn.initializers.ones, (1, 1, 4))
        x = nn.Conv(4, (3,), feature_group_count=4, name="grouped")(x)
        x = nn.ConvTranspose(4, (3,), name="transposed")(x)
        x = nn.Conv(4, (1,), mask=jnp.ones((1, 4, 4)), name="masked")(x)
        x = x + nn.Embed(1, 4, name="table").embedding.reshape(1, 1, 4)
        return nn.DenseGeneral(4, batch_dims=(0,), name="per_row")(x)


def test_every_target_that_is_no_matrix_is_told_at_once():
    base = jax.eval_shape(Odd().init, KEY, X)["params"]
    with pytest.raises(AdapterError) as error:
        lora.add(KEY, base, Lora([("fine/kernel", 5), (".*", 1)], has_magnitude=True), Odd(), X)
    message = str(error.value)
    for text in (
        "fine/kernel has rank 4 at most, less than 5",
        "grouped/kernel is a convolution in 4 groups",
        "transposed/kernel is of ConvTranspose; lora adapts nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed",
        "masked/kernel is a masked convolution",
        "table/embedding is of a module that this call of the model does not reach",
        "per_row/kernel has batch_dims=(0,)",
    ):
        assert text in message
    assert "6 problem(s)" in message


def test_rules_that_do_not_fit():
    base = jax.eval_shape(Odd().init, KEY, X)["params"]
    for pattern in ("norm/scale", ".*bias", "row"):
        with pytest.raises(AdapterError, match="only matches what is no matrix of a module: "):
            lora.add(KEY, base, Lora([(pattern, 1), (".*", None)]), Odd(), X)
    with pytest.raises(paths.RuleError, match=r"'fnie/kernel' matches nothing; nearest paths: fine/kernel"):
        lora.add(KEY, base, Lora([("fnie/kernel", 1), (".*", None)]), Odd(), X)
    with pytest.raises(paths.RuleError, match="no rule covers grouped/kernel"):
        lora.add(KEY, base, Lora([("fine/kernel", 1)]), Odd(), X)
    with pytest.raises(AdapterError, match="embedding is an embedding, and DoRA has none"):
        lora.add(KEY, {"embedding": jnp.ones((9, 4))}, Lora(ALL, has_magnitude=True), nn.Embed(9, 4), TOKENS)


def test_numbers_out_of_range_are_told_at_once():
    with pytest.raises(AdapterError) as error:
        Lora([("a", 0), ("b", -1), ("c", 2.0), ("d", None)], alpha=0.0, dropout_rate=1.0)
    assert "5 problem(s)" in str(error.value)
    for text in (
        "alpha=0.0 must be positive",
        "the rank of 'a'=0 must",
        "'b'=-1 must",
        "'c'=2.0 must",
        "dropout_rate=1.0",
    ):
        assert text in str(error.value)
    with pytest.raises(AdapterError, match="alpha=-1 must be positive"):
        Lora(ALL, alpha=-1)


def test_what_cannot_be_merged():
    with pytest.raises(AdapterError, match="params have no 'adapters'"):
        lora.merge({"kernel": jnp.ones((2, 2))}, Lora(ALL))
    adapters = {"haed": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}, "head": {"down_kernel": jnp.ones((2, 2))}}
    with pytest.raises(AdapterError, match=r"(?s)2 problem.*haed adapts .*nearest: head/kernel.*down_kernel, which"):
        lora.merge({"head": {"kernel": jnp.ones((2, 2))}, "adapters": adapters}, Lora(ALL))


def test_a_quantised_matrix_is_merged_after_it_is_made_whole():
    settings, matrix = Lora(ALL), jnp.ones((2, 8))
    params = {"one": {"kernel": matrix}, "two": {"kernel": matrix}}
    small = quantize(params, [("one/.*", "int8"), (".*", None)])
    adapters = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 8))}
    with pytest.raises(AdapterError, match=r"adapters/one adapts a quantised matrix; merge\(dequantize\(params\)"):
        lora.merge({**small, "adapters": {"one": adapters}}, settings)
    merged = lora.merge({**small, "adapters": {"two": adapters}}, settings)
    assert jax.tree.structure(merged) == jax.tree.structure(small)
    np.testing.assert_array_equal(merged["two"]["kernel"], matrix + 16)
