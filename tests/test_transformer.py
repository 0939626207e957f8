"""The stack: layouts, remat, the cache, who sees whom, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models import ModelError
from jaxdl.models.block import Block
from jaxdl.models.embedding import Embed, padded_size
from jaxdl.models.positions import Rotary
from jaxdl.models.transformer import Stack, init_cache, resolve_layout, stack_layers, token_positions, unstack_layers
from jaxdl.paths import flatten
from jaxdl.plan import count_flops

PLAIN = Block(width=16, n_heads=4, hidden=24, is_causal=True)
BLOCKS = {
    "gpt2": PLAIN,
    "llama": PLAIN.replace(
        norm="rms", rotary=Rotary(), is_gated=True, activation="silu", n_kv_heads=2, query_bias=False, mlp_bias=False
    ),
    "bert": PLAIN.replace(norm_position="post", is_causal=False, activation="gelu"),
    "gemma": PLAIN.replace(
        norm="rms_plus_one", norm_position="both", n_kv_heads=1, head_size=6, rotary=Rotary(), attention_softcap=5.0
    ),
    "window": PLAIN.replace(has_alibi=True, window=3, has_query_key_norm=True),
}
CAUSAL = [name for name in BLOCKS if BLOCKS[name].is_causal]
X = jax.random.normal(jax.random.key(0), (2, 7, 16))
MASK = jnp.array([[1] * 7, [0, 0] + [1] * 5])
DIRECTION = jnp.cos(jnp.arange(2 * 7 * 16.0)).reshape(2, 7, 16)


def make(name, **options):
    stack = Stack((BLOCKS[name],) * 2, **{"layout": "unrolled", **options})
    params = jax.jit(stack.init)(jax.random.key(1), X)["params"]
    return stack, jax.tree.map(lambda leaf: leaf + 0.02 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)


@functools.partial(jax.jit, static_argnums=0)
def run(stack, params, x, inputs):
    return stack.apply({"params": params}, x, **inputs)


def output(stack, params, x=X, **inputs):
    return run(stack, params, x, inputs)[0]


@pytest.mark.parametrize(("name", "n_buckets"), [*((name, 0) for name in BLOCKS), ("window", 8)])
def test_scanned_is_unrolled(name, n_buckets):
    unrolled, params = make(name, n_buckets=n_buckets)
    scanned, stacked = unrolled.clone(layout="scanned"), stack_layers(params)
    shapes = jax.eval_shape(scanned.init, jax.random.key(1), X)["params"]
    assert {path: leaf.shape for path, leaf in flatten(shapes).items()} == {
        path: leaf.shape for path, leaf in flatten(stacked).items()
    }
    np.testing.assert_allclose(
        output(scanned, stacked, mask=MASK), output(unrolled, params, mask=MASK), rtol=2e-5, atol=2e-5
    )
    for path, leaf in flatten(unstack_layers(stacked)).items():
        assert np.array_equal(leaf, flatten(params)[path]), path


DOCUMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2]])
FIRST = [
    *((name, {}, {"mask": MASK[:, ::-1], "documents": DOCUMENTS}) for name in BLOCKS),
    ("window", {"n_buckets": 8}, {}),
    ("bert", {}, {"lengths": jnp.array([7, 5])}),
    ("bert", {"layout": "scanned"}, {}),
]


@pytest.mark.parametrize(("name", "options", "inputs"), FIRST)
def test_the_states_of_the_first_tokens_and_their_gradients_do_not_depend_on_the_others(name, options, inputs):
    stack, params = make(name, **options)

    def loss(params, x, n_first):
        states = stack.apply({"params": params}, x, n_first=n_first, **inputs)[0][:, :2]
        return jnp.sum(DIRECTION[:, :2] * states), states

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (_, cut), gradients = step(params, X, 2)
    (_, whole), expected = step(params, X, None)
    assert jax.eval_shape(lambda: stack.apply({"params": params}, X, n_first=2)[0]).shape == (2, 2, 16)
    np.testing.assert_allclose(cut, whole, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, expected)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_a_last_layer_computes_what_is_read():
    stack = Stack((Block(width=64, n_heads=4, hidden=256),) * 2, layout="unrolled")
    x = jnp.ones((2, 64, 64))
    params = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]

    def loss(params, n_first):
        return stack.apply({"params": params}, x, n_first=n_first)[0][:, 0].sum()

    whole, cut = (sum(count_flops(jax.grad(lambda p, n=n: loss(p, n)), params).values()) for n in (None, 1))
    layer = 24 * 64**2 + 4 * 64 * 64  # a token's, forward
    kept = 4 * 64**2  # keys and values; of the one token nearly nothing
    assert cut / whole == pytest.approx((layer + kept) / (2 * layer), rel=0.03)


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
@pytest.mark.parametrize("remat", ["full", "dots", "dots_without_batch"])
def test_remat_computes_more_and_changes_nothing(layout, remat):
    stack, params = make("llama")
    params = stack_layers(params) if layout == "scanned" else params
    stack = stack.clone(layout=layout)

    def grad_fn(stack):
        return jax.jit(jax.grad(lambda params: jnp.sum(output(stack, params, mask=MASK) * DIRECTION)))

    plain, saving = grad_fn(stack), grad_fn(stack.clone(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), saving(params), plain(params))
    n_remats = str(jax.make_jaxpr(grad_fn(stack.clone(remat=remat)))(params)).count("remat")
    assert n_remats > 0
    assert str(jax.make_jaxpr(grad_fn(stack))(params)).count("remat") == 0


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_gives_what_the_whole_sequence_gives(name, layout):
    stack, params = make(name)
    whole = output(stack, params, mask=MASK)
    stack, params = stack.clone(layout=layout), stack_layers(params) if layout == "scanned" else params
    cache, parts = init_cache(stack, 2, 9), []
    for start, stop in [(0, 3), (3, 4), (4, 7)]:
        part, cache = run(stack, params, X[:, start:stop], {"mask": MASK[:, start:stop], "cache": cache})
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[MASK == 1], whole[MASK == 1], rtol=1e-4, atol=2e-5)
    assert int(cache["length"]) == 7


@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_a_later_one(name):
    stack, params = make(name)
    jacobian = jax.jacobian(lambda x: output(stack, params, x[None])[0].sum(-1))(X[0])
    influence = jnp.abs(jacobian).sum(-1)
    assert bool(jnp.all(influence[jnp.triu_indices(7, 1)] == 0))
    assert bool(jnp.all(jnp.diag(influence) > 0))
    if stack.blocks[0].window is None:
        assert bool(jnp.all(influence[jnp.tril_indices(7)] > 0))


def test_a_window_reaches_no_further_than_its_layers():
    stack, params = make("window")  # 2 layers that see 2 tokens back: 4
    x = jax.random.normal(jax.random.key(2), (9, 16))
    influence = jnp.abs(jax.jacobian(lambda x: output(stack, params, x[None])[0].sum(-1))(x)).sum(-1)
    assert bool(jnp.all(influence[5:, 0] == 0))
    assert float(influence[4, 0]) > 0


@pytest.mark.parametrize("name", BLOCKS)
def test_documents_cannot_see_each_other(name):
    stack, params = make(name)
    documents, positions = jnp.array([[1, 1, 1, 2, 2, 2, 2]]), jnp.array([[0, 1, 2, 0, 1, 2, 3]])
    packed = output(stack, params, X[:1], documents=documents, positions=positions)
    changed = output(stack, params, X[:1].at[:, :3].add(1.0), documents=documents, positions=positions)
    assert bool(jnp.all(packed[:, 3:] == changed[:, 3:]))
    assert not bool(jnp.any(jnp.all(packed[:, :3] == changed[:, :3], -1)))
    np.testing.assert_allclose(packed[:, 3:], output(stack, params, X[:1, 3:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_changes_nothing_and_gets_no_gradient(name):
    stack, params = make(name)

    def real(x):
        return jnp.sum((output(stack, params, x, mask=MASK) * DIRECTION)[MASK == 1])

    grad = jax.grad(real)(X)
    assert bool(jnp.all(grad[1, :2] == 0))
    assert bool(jnp.all(jnp.any(grad[1, 2:] != 0, -1)))
    short = output(stack, params, X[1:, 2:])
    np.testing.assert_allclose(output(stack, params, mask=MASK)[1:, 2:], short, rtol=1e-4, atol=1e-5)


def test_cross_attention_reads_the_memory_or_the_cache_of_it():
    stack = Stack((PLAIN.replace(has_cross=True),) * 2, layout="unrolled")
    memory, memory_mask = jax.random.normal(jax.random.key(3), (2, 5, 16)), jnp.array([[1] * 5, [1, 1, 1, 0, 0]])
    params = jax.jit(stack.init)(jax.random.key(1), X, memory=memory)["params"]
    whole = output(stack, params, memory=memory, memory_mask=memory_mask)
    disturbed = output(stack, params, memory=memory.at[1, 3:].set(9.0), memory_mask=memory_mask)
    assert bool(jnp.all(whole == disturbed))
    assert not bool(jnp.allclose(whole, output(stack, params, memory=memory + 1, memory_mask=memory_mask)))
    cache = init_cache(stack, 2, 7, n_memory=5)
    first, cache = run(stack, params, X[:, :4], {"memory": memory, "memory_mask": memory_mask, "cache": cache})
    rest, _ = run(stack, params, X[:, 4:], {"memory_mask": memory_mask, "cache": cache})
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="needs a memory"):
        stack.apply({"params": params}, X)


def test_dropout_is_off_outside_of_training_and_differs_between_layers():
    block = PLAIN.replace(dropout_rate=0.5, attention_dropout_rate=0.5, hidden_dropout_rate=0.5)
    stack = Stack((block,) * 2, layout="scanned")
    params = stack.init(jax.random.key(1), X)["params"]
    again = [stack.apply({"params": params}, X, train=True, rngs={"dropout": jax.random.key(i)})[0] for i in (0, 0, 1)]
    assert bool(jnp.all(again[0] == again[1]))
    assert not bool(jnp.any(jnp.all(again[0] == again[2], -1)))
    assert bool(jnp.all(output(stack, params) == output(stack, params)))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    stack = Stack((PLAIN.replace(dtype=jnp.bfloat16),) * 2)
    params = stack.init(jax.random.key(1), X.astype(jnp.bfloat16))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    y = output(stack, params, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = output(stack.clone(blocks=(PLAIN,) * 2), params)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.1)


def test_layouts_by_number_of_layers():
    assert resolve_layout("auto", (PLAIN,) * 24) == "unrolled"
    assert resolve_layout("auto", (PLAIN,) * 25) == "scanned"
    assert resolve_layout("auto", (PLAIN,) * 25 + (BLOCKS["bert"],)) == "unrolled"


def test_positions_count_real_tokens():
    cache = {"mask": jnp.array([[True, True, False], [False, True, False]])}
    assert token_positions(2, jnp.array([[1, 1], [1, 1]]), cache).tolist() == [[2, 3], [1, 2]]
    assert token_positions(2, None, cache).tolist() == [[2, 3], [1, 2]]


def test_all_that_is_wrong_with_a_block_is_told_at_once():
    with pytest.raises(ModelError) as caught:
        Block(width=16, n_heads=3, hidden=8, norm="layr", activation="gleu", dropout_rate=1.0)
    text = str(caught.value)
    for part in ("width=16 does not divide over n_heads=3", "norm='layr'", "activation='gleu'", "dropout_rate=1.0"):
        assert part in text
    with pytest.raises(ModelError, match="head_size=5 is odd"):
        dataclasses.replace(PLAIN, head_size=5, rotary=Rotary())
    with pytest.raises(ModelError, match="n_kv_heads=3"):
        PLAIN.replace(n_kv_heads=3)


def test_all_that_is_wrong_with_a_stack_is_told_at_once():
    with pytest.raises(ModelError) as caught:
        Stack((PLAIN, BLOCKS["bert"]), layout="scanned", remat="ful")
    assert "needs equal blocks" in str(caught.value)
    assert "did you mean 'full'" in str(caught.value)
    with pytest.raises(ModelError, match="layer_1 is not there"):
        stack_layers({"layer_0": {"w": jnp.zeros(1)}, "layer_2": {"w": jnp.zeros(1)}})


def test_the_padding_of_the_vocabulary_is_cut_off_and_never_moves():
    embed = Embed(PLAIN, vocab_size=130)
    tokens, positions = jnp.array([[0, 129]]), jnp.array([[0, 1]])
    params = embed.init(jax.random.key(0), tokens, positions)["params"]
    assert params["token"]["embedding"].shape == (padded_size(130), 16) == (256, 16)

    def loss(params):
        x = embed.apply({"params": params}, tokens, positions)
        logits = embed.apply({"params": params}, x, method="logits")
        assert logits.shape == (1, 2, 130)
        return jax.nn.logsumexp(logits, -1).sum()

    grad = jax.grad(loss)(params)["token"]["embedding"]
    assert bool(jnp.all(grad[130:] == 0))
    assert bool(jnp.all(jnp.any(grad[:130] != 0, -1)))


def test_tied_logits_of_bfloat16_come_as_float32_and_their_gradients_products_of_bfloat16():
    embed = Embed(Block(width=16, n_heads=2, hidden=16, dtype=jnp.bfloat16), vocab_size=130)
    params = embed.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))["params"]
    x, weight = jax.random.normal(jax.random.key(1), (3, 16)), jax.random.normal(jax.random.key(2), (3, 130))

    def loss(params, x):
        return jnp.sum(embed.apply({"params": params}, x.astype(jnp.bfloat16), method="logits") * weight)

    def plain(params, x):
        return jnp.sum(x @ params["token"]["embedding"][:130].T * weight)

    assert embed.apply({"params": params}, x.astype(jnp.bfloat16), method="logits").dtype == jnp.float32
    assert set(count_flops(jax.grad(loss, (0, 1)), params, x)) == {"bfloat16"}
    found, expected = (jax.grad(fn, (0, 1))(params, x) for fn in (loss, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)
    along = jax.jvp(loss, (params, x), (params, x))[1]  # forward mode, too: the logits are linear in each
    assert float(along) == pytest.approx(2 * float(loss(params, x)), rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros((1, 5), int), "5 tokens are more than the 4 positions"),
        (jnp.zeros((1, 2)), "tokens are float32"),
        (jnp.zeros(3, int), "tokens have shape"),
    ],
)
def test_tokens_that_do_not_fit(tokens, message):
    with pytest.raises(ModelError, match=message):
        jax.eval_shape(Embed(PLAIN, vocab_size=9, n_positions=4).init, jax.random.key(0), tokens, tokens)
