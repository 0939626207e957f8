"""Llama and its kin: local layers, soft caps, scaled embeddings, caches with windows and grouped heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models import ModelError
from jaxdl.models.apply import init_model
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.positions import Rotary

V, D = 19, 12
BLOCK = llama_block(width=D, n_heads=6, hidden=20, n_kv_heads=2, init_std=0.4)
LOCAL = BLOCK.replace(window=3, rotary=Rotary(50.0))
GEMMA = BLOCK.replace(norm="rms_plus_one", norm_position="both", attention_softcap=2.0, has_query_key_norm=True)
MODELS = {
    "llama": Llama(BLOCK, n_layers=2, vocab_size=V),
    "window": Llama(BLOCK.replace(window=3), n_layers=2, vocab_size=V),
    "local": Llama(BLOCK, n_layers=3, vocab_size=V, local=LOCAL, local_layers=(0, 2)),
    "gemma": Llama(
        GEMMA, n_layers=2, vocab_size=V, is_tied=True, logit_softcap=3.0, embed_scale=D**0.5,
        local=GEMMA.replace(window=3), local_layers=(0,),
    ),
}  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, V)


def create(name, **changes):
    model = MODELS[name].clone(**changes)
    return model, init_model(model, jax.random.key(0), TOKENS)[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_gives_what_one_pass_gives(name):
    model, params = create(name)
    apply, cache, parts = jax.jit(model.apply), model.init_cache(2, 10), []
    for piece in (TOKENS[:, :5], *jnp.split(TOKENS[:, 5:], 4, axis=1)):
        logits, cache = apply({"params": params}, piece, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), apply({"params": params}, TOKENS), rtol=1e-4, atol=1e-5)


def gradient_by_place(model, params, t):
    """(T,) the largest gradient of the states at t by each token's embedding."""

    def value(x):
        return jnp.sum(model.apply({"params": params}, x, method=lambda m, x: m.decoder(x)[0])[:, t] ** 2)

    x = jax.random.normal(jax.random.key(3), (2, 9, D))
    return jnp.abs(jax.jit(jax.grad(value))(x)).max((0, 2))


@pytest.mark.parametrize("name", MODELS)
def test_no_token_depends_on_a_later_one(name):
    model, params = create(name)
    gradient = gradient_by_place(model, params, 5)
    assert (gradient[6:] == 0).all()
    assert (gradient[4:6] > 0).all()


def test_windows_reach_as_far_as_their_layers_add_up():
    for name, reach in (("window", 4), ("llama", 8)):  # two layers of window 3 see 2 tokens back each
        model, params = create(name)
        gradient = gradient_by_place(model, params, 8)
        assert (gradient[: 8 - reach] == 0).all()
        assert (gradient[8 - reach :] > 0).all()


def test_local_layers_are_where_they_are_said_to_be():
    model, _ = create("local")
    assert [block.window for block in model.layer_blocks()] == [3, None, 3]
    assert [block.rotary.theta for block in model.layer_blocks()] == [50.0, 10_000.0, 50.0]


def test_packed_documents_do_not_see_each_other():
    model, params = create("llama")
    documents = jnp.array([[1] * 4 + [2] * 5] * 2)
    whole = model.apply({"params": params}, TOKENS, documents=documents)
    changed = model.apply({"params": params}, TOKENS.at[:, :4].set((TOKENS[:, :4] + 3) % V), documents=documents)
    np.testing.assert_array_equal(whole[:, 4:], changed[:, 4:])
    alone = model.apply({"params": params}, TOKENS[:, 4:])
    np.testing.assert_allclose(whole[:, 4:], alone, rtol=1e-3, atol=1e-4)
    assert not jnp.allclose(model.apply({"params": params}, TOKENS)[:, 4:], alone, atol=1e-2)


def test_caps_bound_the_logits_and_the_scale_reaches_the_embedding():
    model, params = create("gemma")
    logits = model.apply({"params": params}, TOKENS)
    plain = model.clone(logit_softcap=None).apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, 3 * np.tanh(np.asarray(plain) / 3), rtol=1e-5, atol=1e-6)
    assert jnp.abs(logits).max() < 3 < jnp.abs(plain).max()
    larger = {**params, "embed": jax.tree.map(lambda x: x * D**0.5, params["embed"])}
    states = model.clone(head=None).apply({"params": params}, TOKENS)
    again = model.clone(head=None, embed_scale=1.0).apply({"params": larger}, TOKENS)
    np.testing.assert_allclose(states, again, rtol=1e-4, atol=1e-5)


def test_heads_of_a_model_whose_logits_are_not_tied():
    model, params = create("llama")
    assert params["head"]["kernel"].shape == (D, 128)
    classifier, params = create("llama", head="classify", n_outputs=2)
    assert list(params["head"]) == ["kernel"]
    with pytest.raises(ModelError, match="head='classify' has no logits of the next token"):
        classifier.apply({"params": params}, jnp.ones((2, D)), method="logits")
    assert model.apply({"params": create("llama")[1]}, jnp.ones((2, D)), method="logits").shape == (2, V)


def test_fields_that_make_no_network_are_all_named():
    with pytest.raises(ModelError) as error:
        Llama(
            BLOCK, n_layers=2, vocab_size=V, logit_softcap=0.0, local=BLOCK.replace(is_causal=False),
            local_layers=(1, 2), n_positions=0,
        )  # fmt: skip
    words = ("logit_softcap=0.0", "local_layers has [2]", "must be causal", "n_positions=0")
    assert [word for word in words if word not in str(error.value)] == []
    with pytest.raises(ModelError, match="give both or neither"):
        Llama(BLOCK, n_layers=2, vocab_size=V, local=LOCAL)
