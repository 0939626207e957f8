"""BERT and its kin: what padding and documents hide, layouts, heads by hand, refusals, public paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.models import ModelError
from jaxdl.models.bert import Bert, DistilBert, Roberta, bert_base, bert_block
from jaxdl.models.bert_heads import embed_rows
from jaxdl.models.transformer import stack_layers
from jaxdl.paths import flatten

BLOCK = bert_block(8, 2, 12, init_std=0.3)
SIZES = {"n_layers": 2, "vocab_size": 40, "n_positions": 12}
KINDS = [Bert, Roberta, DistilBert]
OUTPUTS = {"classify": {"n_outputs": 3}, "tag": {"n_outputs": 3}}
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
TOKENS = np.where(MASK, np.random.default_rng(0).integers(2, 20, MASK.shape), 1)


def make(kind, head=None, **fields):
    return kind(BLOCK, head=head, **{**SIZES, **OUTPUTS.get(head, {}), **fields})


def init(model, tokens=TOKENS, **inputs):
    return jax.jit(model.init)(jax.random.key(0), tokens, **inputs)


def at_real(model, out):
    """What is defined: the outputs of real tokens, or of rows."""
    return out[MASK.astype(bool)] if out.shape[:2] == MASK.shape else out


@pytest.mark.parametrize(
    ("kind", "head"),
    [(Bert, None), (Bert, "masked_lm"), (Bert, "embed"), (Roberta, "classify"), (Roberta, "span"), (DistilBert, "tag")],
)
def test_what_stands_at_padding_changes_nothing(kind, head):
    model = make(kind, head)
    variables, apply = init(model), jax.jit(model.apply)
    other = np.where(MASK, TOKENS, 39)
    clean, dirty = (apply(variables, tokens, mask=MASK) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(at_real(model, clean), at_real(model, dirty))
    seen = apply(variables, other, mask=np.ones_like(MASK))
    assert np.abs(at_real(model, clean) - at_real(model, seen)).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_at_padding_have_a_gradient_of_exactly_zero(kind):
    model, padding = make(kind, "tag"), np.where(MASK, TOKENS, 39)
    variables = init(model)

    def loss(params):
        out = model.apply({"params": params}, padding, mask=MASK)
        return (out * jnp.asarray(MASK)[..., None] * jnp.arange(1.0, 4.0).reshape(1, 1, 3)).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])["embed"]
    table = np.asarray(gradient["token"]["embedding"])
    assert (table[39] == 0).all()
    assert all(np.abs(table[token]).max() > 1e-6 for token in TOKENS[MASK.astype(bool)])
    positions = np.abs(np.asarray(gradient["position"]["embedding"])).max(1)
    first = 2 if kind is Roberta else 0
    np.testing.assert_array_equal(positions > 0, [first <= i < first + 6 for i in range(12)])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind):
    model = make(kind, "tag")
    documents = np.array([[1, 1, 1, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 0]])
    variables, apply = init(model), jax.jit(model.apply)
    packed = apply(variables, TOKENS[:1], documents=documents, positions=positions, mask=documents > 0)
    for start, end in ((0, 3), (3, 5)):
        alone = apply(variables, TOKENS[:1, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, atol=1e-5)
    mixed = apply(variables, TOKENS[:1], positions=positions, mask=documents > 0)
    assert np.abs(mixed - packed)[:, :5].max() > 1e-3


@pytest.mark.parametrize(("kind", "remat"), [(Roberta, "none"), (DistilBert, "full")])
def test_scanned_is_unrolled(kind, remat):
    plain, scanned = make(kind, "tag", layout="unrolled"), make(kind, "tag", layout="scanned", remat=remat)
    params = init(plain)["params"]
    assert jax.tree.map(jnp.shape, stack_layers(params)) == jax.tree.map(jnp.shape, init(scanned)["params"])

    def value(model):
        return lambda params: (model.apply({"params": params}, TOKENS, mask=MASK) ** 2).sum()

    (a, ga), (b, gb) = (
        jax.jit(jax.value_and_grad(value(model)))(tree)
        for model, tree in ((plain, params), (scanned, stack_layers(params)))
    )
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), stack_layers(ga), gb)


def test_positions_of_roberta_count_real_tokens_from_two():
    model = make(Roberta)
    variables, apply = init(model), jax.jit(model.apply)
    clean = apply(variables, TOKENS, mask=MASK)
    given = apply(variables, TOKENS, mask=MASK, positions=np.broadcast_to(np.arange(6), (3, 6)))
    np.testing.assert_array_equal(at_real(model, clean), at_real(model, given))
    left, mask = np.array([[1, 5, 6, 7]]), np.array([[0, 1, 1, 1]])
    np.testing.assert_allclose(apply(variables, left, mask=mask)[:, 1:], apply(variables, left[:, 1:]), atol=1e-5)
    plain = make(Roberta, padding_token=None)
    assert np.abs(plain.apply(variables, left, mask=mask)[:, 1:] - apply(variables, left[:, 1:])).max() > 1e-3


def test_an_embedding_is_the_mean_of_real_tokens_of_length_one():
    model = make(Bert, "embed")
    variables = init(model)
    hidden = np.asarray(make(Bert).apply(variables, TOKENS, mask=MASK), np.float64)
    mean = np.stack([row[mask.astype(bool)].mean(0) for row, mask in zip(hidden, MASK, strict=True)])
    out = model.apply(variables, TOKENS, mask=MASK)
    np.testing.assert_allclose(out, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    first = make(Bert, "embed", pooling="first", is_normalized=False).apply(variables, TOKENS, mask=MASK)
    np.testing.assert_allclose(first, hidden[:, 0], atol=1e-6)


def test_a_row_without_tokens_has_a_finite_embedding_and_gradient():
    def value(x):
        return embed_rows(x, jnp.array([[0, 0], [1, 0]]), pooling="mean", is_normalized=True)

    out, gradient = value(jnp.ones((2, 2, 3))), jax.grad(lambda x: value(x)[:, 0].sum())(jnp.ones((2, 2, 3)))
    assert (out[0] == 0).all()
    assert np.isfinite(gradient).all()
    assert (gradient[0] == 0).all()
    assert np.abs(gradient[1, 0]).max() > 0.1


def test_logits_of_hidden_states_are_the_output():
    model = make(Bert, "masked_lm", n_layers=1)
    variables = init(model)
    hidden = model.apply(variables, TOKENS, mask=MASK, method="hidden")
    out = model.apply(variables, TOKENS, mask=MASK)
    assert out.shape == (3, 6, 40)
    np.testing.assert_allclose(model.apply(variables, hidden[:, 2:4], method="logits"), out[:, 2:4], atol=1e-6)
    gradient = jax.jit(jax.grad(lambda v: (model.apply(v, TOKENS, mask=MASK) ** 2).sum()))(variables)["params"]
    assert (gradient["head"]["bias"][40:] == 0).all()
    assert (gradient["embed"]["token"]["embedding"][40:] == 0).all()
    assert np.abs(gradient["head"]["bias"][:40]).min() > 0


def test_a_pooler_beside_the_hidden_states():
    model = make(Bert, has_pooler=True)
    variables = init(model)
    out, pooler = model.apply(variables, TOKENS), variables["params"]["pooler"]
    np.testing.assert_allclose(out.pooled, np.tanh(out.hidden[:, 0] @ pooler["kernel"]), atol=1e-5)
    np.testing.assert_array_equal(out.hidden, make(Bert).apply(variables, TOKENS))


@pytest.mark.parametrize(
    ("kind", "head"),
    [(Bert, "classify"), (Roberta, "classify"), (DistilBert, "classify"), (Bert, "masked_lm")],
)
def test_dropout_needs_training_and_low_precision_gives_float32(kind, head):
    model = make(kind, head, n_layers=1, head_dropout_rate=0.0 if head == "masked_lm" else 0.5)
    variables = init(model)
    calm = jax.jit(model.apply)(variables, TOKENS, mask=MASK)
    train = jax.jit(lambda key: model.apply(variables, TOKENS, mask=MASK, train=True, rngs={"dropout": key}))
    noisy = [train(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert (noisy[0] != noisy[2]).any()
    low = jax.jit(model.clone(block=BLOCK.replace(dtype=jnp.bfloat16)).apply)(variables, TOKENS, mask=MASK)
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - calm).max() < 0.5 * max(1.0, np.abs(calm).max())


def test_a_classifier_learns_which_half_of_the_vocabulary_it_reads():
    model = make(Bert, "classify", n_outputs=2, n_layers=1)
    tokens = np.random.default_rng(1).integers(2, 40, (32, 6))
    label, tx = jnp.asarray((tokens[:, 0] >= 20).astype(np.int32)), optax.adam(1e-2)
    params = init(model, tokens)["params"]

    def loss_fn(params):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, tokens), label).mean()

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    losses = jax.jit(lambda c: jax.lax.scan(step, c, length=60))((params, tx.init(params)))[1]
    assert losses[-1] < 0.1 < 0.4 < losses[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"head": "clasify"}, "head='clasify' is unknown; did you mean 'classify'"),
        ({"head": "classify"}, "n_outputs=0 must be a whole number of at least 1"),
        ({"head": "span", "n_outputs": 2}, "n_outputs=2 has no use for head='span'"),
        ({"head": "tag", "n_outputs": 2, "labels": ("O",)}, "must be n_outputs=2 names"),
        ({"head": "tag", "n_outputs": 2, "has_pooler": True}, "has_pooler=True is for head=None"),
        ({"pooling": "max"}, "pooling='max' is unknown"),
        ({"padding_token": 40}, "padding_token=40 must be one of the tokens"),
        ({"padding_token": 11}, "leave positions after it"),
        ({"n_positions": None, "padding_token": 1}, "n_positions=None must be a whole number"),
        ({"block": BLOCK.replace(is_causal=True)}, "an encoder has neither"),
        ({"n_layers": 0}, "n_layers=0"),
    ],
)
def test_fields_that_make_no_network_are_refused(fields, said):
    with pytest.raises(ModelError, match=said):
        Bert(**{"block": BLOCK, **SIZES, **fields})


def test_all_problems_are_listed_at_once():
    with pytest.raises(ModelError, match="DistilBert: 3 problem") as caught:
        DistilBert(BLOCK, n_layers=0, vocab_size=40, head="clasify", layout="rolled")
    assert "layout='rolled' is unknown" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "head", "inputs", "said"),
    [
        (Bert, None, {"tokens": np.full((1, 13), 2)}, "13 tokens are more than the 12 positions"),
        (Roberta, None, {"tokens": np.full((1, 11), 2)}, "11 tokens are more than the 10 positions"),
        (Bert, None, {"tokens": np.array([[2, 40]])}, "tokens run from 2 to 40; with vocab_size=40"),
        (Bert, None, {"tokens": np.array([[-1, 4]])}, "tokens run from -1 to 4"),
        (Bert, None, {"tokens": np.array([[0.5]])}, "they must be integers"),
        (Bert, None, {"tokens": TOKENS, "token_types": TOKENS}, "token_types run from 1"),
        (DistilBert, None, {"tokens": TOKENS, "token_types": 0 * TOKENS}, "has no token types"),
        (Bert, "classify", {"tokens": TOKENS, "documents": MASK}, "documents pack several into it"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(kind, head, inputs, said):
    model = make(kind, head)
    with pytest.raises(ModelError, match=said):
        model.apply(init(model), **inputs)


def test_known_tokens_may_be_closed_over_by_jit():
    model, tokens = make(Bert), jnp.asarray(TOKENS)
    variables = init(model)
    inside = jax.jit(lambda variables: model.apply(variables, tokens))(variables)
    np.testing.assert_allclose(inside, model.apply(variables, tokens), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="tokens run from 40 to 40"):
        jax.jit(lambda variables: model.apply(variables, 0 * TOKENS + 40))(variables)


def test_logits_of_another_head_are_refused():
    model = make(Bert, "tag")
    with pytest.raises(ModelError, match="head='tag' has no logits over tokens"):
        model.apply(init(model), jnp.ones((1, 8)), method="logits")


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (
            make(Bert, "classify"),
            {"pooler/kernel": (8, 8), "head/kernel": (8, 3), "embed/token_type/embedding": (2, 8)},
        ),
        (make(Roberta, "classify"), {"head/dense/kernel": (8, 8), "head/output/bias": (3,)}),
        (make(DistilBert, "span"), {"head/kernel": (8, 2), "embed/position/embedding": (12, 8)}),
        (
            make(Bert, "masked_lm"),
            {"head/dense/bias": (8,), "head/norm/scale": (8,), "head/bias": (128,), "embed/token/embedding": (128, 8)},
        ),
        (make(Bert, layout="scanned"), {"encoder/layers/attention/query/kernel": (2, 8, 8)}),
        (
            make(Bert),
            {
                "encoder/layer_1/attention/output/bias": (8,),
                "encoder/layer_0/attention_norm/scale": (8,),
                "encoder/layer_0/mlp/down/kernel": (12, 8),
                "encoder/layer_0/mlp_norm/bias": (8,),
                "embed/norm/bias": (8,),
            },
        ),
    ],
    ids=["pooler", "tanh", "span", "masked_lm", "scanned", "bare"],
)
def test_paths_are_public(model, lines):
    shapes = {
        path: leaf.shape
        for path, leaf in flatten(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]).items()
    }
    assert lines.items() <= shapes.items()
    assert {"final_norm", "head_dropout"}.isdisjoint(name for path in shapes for name in path.split("/"))
    assert ("embed/token_type/embedding" in shapes) == (type(model) is not DistilBert)


def test_the_published_size():
    shapes = jax.eval_shape(bert_base(has_pooler=True).init, jax.random.key(0), TOKENS)
    n = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert n - (30592 - 30522) * 768 == 109_482_240
