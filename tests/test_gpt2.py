"""GPT-2 and what all decoders share: heads, caches, causality, packing, layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models import ModelError
from jaxdl.models.apply import init_model
from jaxdl.models.gpt2 import GPT2, gpt2_block, gpt2_small
from jaxdl.models.transformer import stack_layers

V, D = 19, 12
BLOCK = gpt2_block(width=D, n_heads=3, init_std=0.3)
MODEL = GPT2(BLOCK, n_layers=2, vocab_size=V, n_positions=16)
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, V)


@pytest.fixture(scope="module")
def params():
    return init_model(MODEL, jax.random.key(0), TOKENS)[0]


def test_the_paths_are_these():
    model = MODEL.clone(n_layers=1, head="tag", n_outputs=4)
    shapes = jax.tree.map(jnp.shape, init_model(model, jax.random.key(0), TOKENS)[0])
    norm = {"bias": (D,), "scale": (D,)}
    linear = {"bias": (D,), "kernel": (D, D)}
    assert shapes == {
        "embed": {"token": {"embedding": (128, D)}, "position": {"embedding": (16, D)}},
        "decoder": {
            "final_norm": norm,
            "layer_0": {
                "attention_norm": norm,
                "attention": dict.fromkeys(("query", "key", "value", "output"), linear),
                "mlp_norm": norm,
                "mlp": {
                    "up": {"bias": (4 * D,), "kernel": (D, 4 * D)},
                    "down": {"bias": (D,), "kernel": (4 * D, D)},
                },
            },
        },
        "head": {"bias": (4,), "kernel": (D, 4)},
    }


def test_no_token_depends_on_a_later_one(params):
    embedded = params["embed"]["token"]["embedding"]
    table = jax.nn.one_hot(TOKENS, 128)

    def logits(onehot):  # tokens as a sum of rows, so that each place has a gradient
        x = onehot @ embedded + params["embed"]["position"]["embedding"][:9][None]
        return MODEL.apply({"params": params}, x, method=lambda m, x: m.logits(m.decoder(x)[0]))

    for t in (0, 4, 8):
        gradient = jax.grad(lambda onehot, t=t: jnp.sum(logits(onehot)[:, t] ** 2))(table)
        assert (gradient[:, t + 1 :] == 0).all()
        assert (jnp.abs(gradient[:, : t + 1]).max(-1) > 0).all()
    np.testing.assert_allclose(logits(table), MODEL.apply({"params": params}, TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1]])
@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_a_cache_gives_what_one_pass_gives(params, pieces, layout):
    model = MODEL.clone(layout=layout)
    own = params if layout == "unrolled" else {**params, "decoder": stack_layers(params["decoder"])}
    cache, parts, start = model.init_cache(2, 12), [], 0
    for n in pieces:
        logits, cache = model.apply({"params": own}, TOKENS[:, start : start + n], cache=cache)
        parts.append(logits)
        start += n
    expected = MODEL.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=1e-4, atol=1e-5)
    assert int(cache["length"]) == 9


def test_padding_on_either_side_changes_no_real_token(params):
    expected = MODEL.apply({"params": params}, TOKENS[:, :6])
    filler = jnp.full((2, 3), 7)
    left = MODEL.apply(
        {"params": params}, jnp.concatenate([filler, TOKENS[:, :6]], 1), mask=jnp.ones((2, 9)).at[:, :3].set(0)
    )
    right = MODEL.apply(
        {"params": params}, jnp.concatenate([TOKENS[:, :6], filler], 1), mask=jnp.ones((2, 9)).at[:, 6:].set(0)
    )
    np.testing.assert_allclose(left[:, 3:], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(right[:, :6], expected, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other(params):
    documents = jnp.array([[1] * 4 + [2] * 5] * 2)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = {"documents": documents, "positions": positions}
    whole = MODEL.apply({"params": params}, TOKENS, **packed)
    changed = MODEL.apply({"params": params}, TOKENS.at[:, :4].set((TOKENS[:, :4] + 3) % V), **packed)
    np.testing.assert_array_equal(whole[:, 4:], changed[:, 4:])
    assert (whole[:, :4] != changed[:, :4]).any()
    for part in (slice(0, 4), slice(4, 9)):
        alone = MODEL.apply({"params": params}, TOKENS[:, part])
        np.testing.assert_allclose(whole[:, part], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots_without_batch"])
def test_scanned_layers_are_the_unrolled_ones(params, remat):
    stacked = {**params, "decoder": stack_layers(params["decoder"])}
    scanned = MODEL.clone(layout="scanned", remat=remat)
    loss = lambda model: lambda p: jnp.mean(model.apply({"params": p}, TOKENS) ** 2)  # noqa: E731
    value, gradient = jax.value_and_grad(loss(scanned))(stacked)
    expected, wanted = jax.value_and_grad(loss(MODEL))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    wanted = {**wanted, "decoder": stack_layers(wanted["decoder"])}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), gradient, wanted)


def test_classification_reads_the_last_real_token(params):
    model = MODEL.clone(head="classify", n_outputs=3)
    own = {**params, "head": {"kernel": jax.random.normal(jax.random.key(9), (D, 3))}}
    hidden = MODEL.clone(head=None).apply({"params": params}, TOKENS)
    mask = jnp.ones((2, 9), int).at[0, 5:].set(0)
    expected = jnp.stack([hidden[0, 4], hidden[1, 8]]) @ own["head"]["kernel"]
    np.testing.assert_allclose(model.apply({"params": own}, TOKENS, mask=mask), expected, rtol=1e-4, atol=1e-5)
    filled = jnp.where(mask == 1, jnp.where(TOKENS == 2, 3, TOKENS), 2)
    by_token = model.clone(padding_token=2).apply({"params": own}, filled)
    np.testing.assert_array_equal(by_token, model.apply({"params": own}, filled, mask=mask | (filled != 2)))
    assert not jnp.allclose(by_token, model.apply({"params": own}, filled))


def test_embeddings_are_means_of_length_one(params):
    mask = jnp.ones((2, 9), int).at[0, 5:].set(0)
    out = MODEL.clone(head="embed").apply({"params": params}, TOKENS, mask=mask)
    hidden = MODEL.clone(head=None).apply({"params": params}, TOKENS, mask=mask)
    mean = np.stack([hidden[0, :5].mean(0), hidden[1].mean(0)])
    np.testing.assert_allclose(out, mean / np.linalg.norm(mean, axis=-1, keepdims=True), rtol=1e-5)


def test_logits_of_the_vocabulary_only_and_hidden_states_apart(params):
    hidden = MODEL.apply({"params": params}, TOKENS, method="hidden")
    logits = MODEL.apply({"params": params}, hidden, method="logits")
    assert logits.shape == (2, 9, V)
    np.testing.assert_array_equal(logits, MODEL.apply({"params": params}, TOKENS))


def test_the_published_size():
    shapes = jax.eval_shape(gpt2_small().init, jax.random.key(0), TOKENS)["params"]
    n = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - (50304 - 50257) * 768
    assert n == 124_439_808


def test_fields_that_make_no_network_are_all_named():
    with pytest.raises(ModelError) as error:
        GPT2(BLOCK.replace(is_causal=False), n_layers=0, vocab_size=-1, head="clasify", n_positions=0)
    words = ("n_layers=0", "vocab_size=-1", "did you mean 'classify'", "sees the future", "n_positions=0")
    assert [word for word in words if word not in str(error.value)] == []
    with pytest.raises(ModelError, match="n_outputs=None"):
        GPT2(BLOCK, n_layers=1, vocab_size=3, head="tag")
    with pytest.raises(ModelError, match="labels names 1 outputs and n_outputs=2"):
        GPT2(BLOCK, n_layers=1, vocab_size=3, head="tag", n_outputs=2, labels=("one",))
