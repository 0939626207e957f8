"""T5: paths, masks, decoding with a cache equal to the whole forward pass, version 1.1, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.models.checks import ModelError
from jaxdl.models.t5 import T5, shift_right, t5_block, t5_small
from jaxdl.paths import flatten

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(2, 37, (3, 7))
MASK = np.ones((3, 7), np.int32)
MASK[0, 5:], MASK[2, :2] = 0, 0
INPUTS = RNG.integers(2, 37, (3, 6))
BLOCK = t5_block(12, 3, 20, head_size=6)


def make(**fields):
    return T5(**{"block": BLOCK, "n_layers": 2, "vocab_size": 37, "n_buckets": 8, "max_distance": 12, **fields})


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def params(model):
    params = jax.jit(model.init)(jax.random.key(0), TOKENS, inputs=INPUTS)["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * jnp.asarray(noise.normal(size=x.shape), x.dtype), params)


def test_paths_and_shapes(params):
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert shapes["embed/token/embedding"] == (128, 12)
    assert shapes["encoder/relative/embedding"] == shapes["decoder/relative/embedding"] == (8, 3)
    assert shapes["decoder/layer_1/cross/key/kernel"] == (12, 18)
    assert not [path for path in shapes if path.endswith("bias") or path.startswith("head")]
    assert not [path for path in shapes if path.startswith("encoder/") and "cross" in path]
    assert {path.split("/")[-2] for path in shapes if path.startswith("decoder/layer_0/mlp/")} == {"up", "down"}


def test_version_1_1_is_gated_and_has_its_own_head():
    new = make(block=t5_block(12, 3, 20, is_gated=True), is_tied=False, is_output_scaled=False, n_decoder_layers=1)
    shapes = jax.eval_shape(new.init, jax.random.key(0), TOKENS, inputs=INPUTS)["params"]
    assert shapes["head"]["kernel"].shape == (12, 128)
    assert sorted(shapes["decoder"]["layer_0"]["mlp"]) == ["down", "gate", "up"]
    assert "layer_1" not in shapes["decoder"]
    assert "layer_1" in shapes["encoder"]


def test_heads(model, params):
    hidden = make(head=None).apply({"params": params}, TOKENS, inputs=INPUTS, mask=MASK)
    logits = model.apply({"params": params}, TOKENS, inputs=INPUTS, mask=MASK)
    assert (hidden.shape, logits.shape) == ((3, 6, 12), (3, 6, 37))
    expected = hidden * 12**-0.5 @ params["embed"]["token"]["embedding"][:37].T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.apply({"params": params}, hidden, method="logits"), logits)
    memory = model.apply({"params": params}, TOKENS, mask=MASK, method="encode")
    alone = make(head="encode").apply({"params": params}, TOKENS, mask=MASK)
    np.testing.assert_array_equal(memory, alone)
    again = model.apply({"params": params}, None, memory=memory, mask=MASK, inputs=INPUTS)
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (4, 2), (2, 1, 3)])
def test_decoding_with_a_cache_is_the_whole_forward_pass(params, layout, chunks):
    from jaxdl.models.transformer import stack_layers

    model, params = make(layout=layout), stack_layers(params) if layout == "scanned" else params
    expected = model.apply({"params": params}, TOKENS, mask=MASK, inputs=INPUTS)
    cache, parts, start = model.init_cache(3, 9, n_memory=7), [], 0
    step = jax.jit(lambda tokens, mask, inputs, cache: model.apply(
        {"params": params}, tokens, mask=mask, inputs=inputs, cache=cache
    ))  # fmt: skip
    for n in chunks:
        source = (TOKENS, MASK) if start == 0 else (None, None)
        logits, cache = step(*source, INPUTS[:, start : start + n], cache)
        parts.append(logits)
        start += n
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-4, atol=1e-5)


def test_masked_source_tokens_change_nothing(model, params):
    changed = np.where(MASK == 0, (TOKENS + 5) % 37, TOKENS)
    assert (changed != TOKENS).any()
    a, b = (model.apply({"params": params}, tokens, mask=MASK, inputs=INPUTS) for tokens in (TOKENS, changed))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    c = model.apply({"params": params}, changed, inputs=INPUTS)
    assert float(jnp.abs(c - a).max()) > 1e-2


def test_the_cache_keeps_the_mask_of_the_source(model, params):
    cache = model.init_cache(3, 2, n_memory=7)
    _, cache = model.apply({"params": params}, TOKENS, mask=MASK, inputs=INPUTS[:, :1], cache=cache)
    np.testing.assert_array_equal(cache["memory_mask"], MASK.astype(bool))


def test_the_decoder_is_causal_and_the_encoder_is_not(model, params):
    inputs, source = jnp.arange(6)[None], jnp.full((1, 2), 30)

    def third(table):
        own = params | {"embed": {"token": {"embedding": table}}}
        return model.apply({"params": own}, source, inputs=inputs, method="hidden")[:, 2].sum()

    gradient = jnp.abs(jax.jit(jax.grad(third))(params["embed"]["token"]["embedding"])).sum(1)
    assert not gradient[3:6].any()
    assert bool((gradient[:3] > 0).all())
    encode = jax.jit(lambda tokens: model.apply({"params": params}, tokens, method="encode"))
    first = encode(TOKENS)[:, 0]
    later = np.array(TOKENS)
    later[:, -1] = (later[:, -1] + 1) % 37
    assert not np.allclose(first, encode(later)[:, 0], atol=1e-4)


def test_positions_are_relative(model, params):
    """Two more tokens of padding on the left move nothing."""
    pad = ((0, 0), (2, 0))
    apply = jax.jit(model.apply)
    plain = apply({"params": params}, TOKENS, inputs=INPUTS)
    moved = apply(
        {"params": params},
        np.pad(TOKENS, pad),
        mask=np.pad(np.ones_like(TOKENS), pad),
        inputs=np.pad(INPUTS, pad),
        inputs_mask=np.pad(np.ones_like(INPUTS), pad),
    )
    np.testing.assert_allclose(moved[:, 2:], plain, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training_only(params):
    rates = dict.fromkeys(("dropout_rate", "attention_dropout_rate", "hidden_dropout_rate"), 0.3)
    model = make(block=t5_block(12, 3, 20, head_size=6, **rates))
    apply = jax.jit(lambda key: model.apply(
        {"params": params}, TOKENS, inputs=INPUTS, train=True, rngs={"dropout": key}
    ))  # fmt: skip
    first, second = apply(jax.random.key(1)), apply(jax.random.key(2))
    assert not np.allclose(first, second)
    calm = model.apply({"params": params}, TOKENS, inputs=INPUTS)
    np.testing.assert_array_equal(calm, make().apply({"params": params}, TOKENS, inputs=INPUTS))


def test_it_learns_to_copy():
    model = T5(t5_block(32, 4, 64), n_layers=1, vocab_size=12)
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 12, (64, 5)))
    inputs = shift_right(tokens)
    params = jax.jit(model.init)(jax.random.key(0), tokens, inputs=inputs)["params"]
    tx = optax.adam(3e-3)  # with 1e-2 single losses jump

    def loss_fn(params):
        logits = model.apply({"params": params}, tokens, inputs=inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state = carry
            loss, gradient = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.lax.scan(step, (params, tx.init(params)), None, length=120)[1]

    losses = train(params)
    assert 2 < float(losses[0]) < 6
    assert float(losses[-1]) < 0.2


def test_all_problems_of_the_fields_at_once():
    with pytest.raises(ModelError, match="4 problem") as error:
        make(block=BLOCK.replace(is_causal=True), head="seq2seq", n_buckets=2, n_decoder_layers=0)
    assert "did you mean" in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": TOKENS}, "there are no inputs"),
        ({"tokens": None, "inputs": INPUTS}, "there is no source"),
        ({"tokens": TOKENS, "inputs": INPUTS, "memory": np.zeros((3, 7, 12))}, "both given"),
    ],
)
def test_inputs_that_do_not_fit(model, params, given, said):
    with pytest.raises(ModelError, match=said):
        model.apply({"params": params}, **given)


def test_a_cache_for_another_source_is_refused(model, params):
    cache = model.init_cache(3, 4, n_memory=5)
    with pytest.raises(ModelError, match="n_memory=5"):
        model.apply({"params": params}, TOKENS, inputs=INPUTS[:, :1], cache=cache)


def test_the_published_size():
    model, tokens = t5_small(), jnp.zeros((1, 2), int)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, inputs=tokens))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 60_506_624
