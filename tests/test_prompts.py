"""Prompts and prefixes: against a larger table, against a cache of keys and values, in batches, in generation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.finetune.adapters import AdaptedModel, AdapterError, adapted, add
from jaxdl.finetune.prompts import InsertSlots, Slots
from jaxdl.generate import GenerateError, generate
from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.t5 import T5, t5_block
from jaxdl.models.transformer import stack_layers

KEY = jax.random.key(0)
TOKENS = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
KEYS_AND_VALUES = [(".*/attention/(key|value)", True), (".*", False)]
PROMPT = Slots(2, first_id=128)
PREFIX = Slots(2, first_id=128, prefix=KEYS_AND_VALUES)


def gpt2(**fields):
    block = gpt2_block(width=8, n_heads=2, init_std=0.4)
    return GPT2(block, n_layers=2, vocab_size=11, n_positions=32, **{"layout": "unrolled", **fields})


def filled(model, *inputs, **kw):
    """Parameters of every kind of value, without a compilation of the model's own draws."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(model.init, **kw), KEY, *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.4, leaf.shape), jnp.float32), shapes)


def create(model, settings, **kw):
    return add(jax.random.key(1), filled(model, TOKENS, **kw), settings, model, TOKENS, **kw)


def run(model, params, settings, tokens, **kw):
    apply = adapted(model.apply, settings)
    return jax.jit(lambda params, tokens, kw: apply({"params": params}, tokens, **kw))(params, tokens, kw)


def base_of(params):
    return {name: tree for name, tree in params.items() if name != "adapters"}


def test_a_prompt_is_rows_of_a_larger_table():
    model = gpt2()
    params = create(model, PROMPT)
    base, insert = base_of(params), InsertSlots(PROMPT, at=1)
    slotted = insert({"tokens": TOKENS})["tokens"]
    table = base["embed"]["token"]["embedding"].at[50:52].set(params["adapters"]["embed"]["token"]["prompt"])
    larger = {**base, "embed": {**base["embed"], "token": {"embedding": table}}}
    expected = jax.jit(model.apply)({"params": larger}, np.where(slotted >= 128, slotted - 78, slotted))
    np.testing.assert_array_equal(run(model, params, PROMPT, slotted), expected)
    assert np.isnan(model.apply({"params": base}, slotted)).all(axis=-1)[:, 1:].all()


def with_prefix_in_cache(model, params, tokens):
    """The keys and values of the prefix as those of tokens that were read before."""
    n_rows, n = len(tokens), PREFIX.n_slots
    cache = model.init_cache(n_rows, n + tokens.shape[1])
    for layer, own in params["adapters"]["decoder"].items():
        for part in ("key", "value"):
            heads = own["attention"][part]["prefix"].reshape(n, 2, -1).swapaxes(0, 1)
            empty = cache["layers"][layer]["attention"][part]
            cache["layers"][layer]["attention"][part] = empty.at[:, :n].set(jnp.tile(heads, (n_rows, 1, 1)))
    cache = {**cache, "mask": cache["mask"].at[:, :n].set(True), "length": jnp.int32(n)}
    return jax.jit(model.apply)({"params": base_of(params)}, tokens, cache=cache)[0]


def test_a_prefix_is_keys_and_values_before_the_tokens():
    model = gpt2()
    params = create(model, PREFIX)
    slotted = InsertSlots(PREFIX)({"tokens": TOKENS})["tokens"]
    found = run(model, params, PREFIX, slotted)[:, 2:]
    np.testing.assert_allclose(found, with_prefix_in_cache(model, params, TOKENS), rtol=1e-4, atol=1e-4)
    plain = jax.jit(model.apply)({"params": base_of(params)}, TOKENS)
    assert np.abs(found - plain).max() > 0.1


@pytest.mark.parametrize("settings", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_scanned_and_remat_are_the_plain_model(settings):
    params = create(gpt2(), settings)
    slotted = InsertSlots(settings)({"tokens": TOKENS})["tokens"]

    def value_and_gradient(model, params):
        def loss(adapters):
            y = adapted(model.apply, settings)({"params": {**params, "adapters": adapters}}, slotted)
            return y[:, 2:, 3].sum(), y

        (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params["adapters"])
        return y, gradient

    y, gradient = value_and_gradient(gpt2(), params)
    z, other = value_and_gradient(gpt2(layout="scanned", remat="full"), stack_layers(params))
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
    gradient = stack_layers(gradient)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), gradient, other)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("settings", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_bert_with_slots_does_not_see_padding(settings):
    block = bert_block(8, 2, 16, init_std=0.4)
    model = Bert(block, n_layers=2, vocab_size=11, n_positions=16, head="classify", n_outputs=3)
    params = create(model, settings)
    insert = InsertSlots(settings, at=1)
    short = insert({"tokens": TOKENS, "mask": np.ones_like(TOKENS), "token_types": np.ones_like(TOKENS)})
    padded = {key: np.pad(value, ((0, 0), (0, 2))) for key, value in short.items()}
    outputs = [run(model, params, settings, **batch) for batch in (short, padded)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    bare = {"tokens": TOKENS, "mask": np.ones_like(TOKENS), "token_types": np.ones_like(TOKENS)}
    apply = jax.jit(lambda params, tokens, kw: model.apply({"params": params}, tokens, **kw))
    plain = apply(base_of(params), bare.pop("tokens"), bare)
    assert np.abs(outputs[0] - plain).max() > 1e-3


@pytest.mark.parametrize("settings", [PROMPT, PREFIX], ids=["prompt", "prefix"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_after_slots_is_the_full_forward_pass(settings, family):
    block = llama_block(width=8, n_heads=2, hidden=12, init_std=0.4)
    model = gpt2() if family == "gpt2" else Llama(block, n_layers=2, vocab_size=11)
    params = create(model, settings)
    forward = jax.jit(lambda tokens: adapted(model.apply, settings)({"params": params}, tokens))
    expected = []
    for prompt in ([1, 2, 3], [4]):
        row, n = np.zeros((1, 12), np.int32), len(prompt) + 2
        row[0, :n] = [*settings.slot_ids, *prompt]
        for i in range(n, n + 5):
            row[0, i] = np.argmax(forward(row)[0, i - 1])
        expected.append(row[0, n : n + 5].tolist())
    prompts = [[*settings.slot_ids, *prompt] for prompt in ([1, 2, 3], [4])]
    assert generate(AdaptedModel(model, settings), params, prompts, max_new_tokens=5) == expected
    with pytest.raises(GenerateError, match=r"prompt 0 has tokens \[128, 129\], and the vocabulary is 0 to 10"):
        generate(model, base_of(params), prompts, max_new_tokens=5)


def test_slots_of_an_encoder_are_not_those_of_its_decoder():
    model, inputs = T5(t5_block(8, 2, 16), n_layers=1, vocab_size=11), np.array([[0, 7], [0, 8]], np.int32)
    rules = [("encoder/.*/attention/(key|value)", True), (".*", False)]
    settings = Slots(2, first_id=128, prefix=rules)
    params = create(model, settings, inputs=inputs)
    slotted = InsertSlots(settings)({"tokens": TOKENS, "decoder_tokens": inputs})
    y = run(model, params, settings, slotted["tokens"], inputs=slotted["decoder_tokens"])
    assert y.shape == (2, 2, 11)
    assert np.isfinite(y).all()
    cross = Slots(2, first_id=128, prefix=[("decoder/.*/cross/key", True), (".*", False)])
    params = create(model, cross, inputs=inputs)
    with pytest.raises(AdapterError, match=r"cross/key has .* an output \(2, 5, 8\), but the tokens are \(2, 2\)"):
        run(model, params, cross, slotted["tokens"], inputs=inputs)


def test_how_a_prompt_begins():
    model = gpt2()
    params = create(model, Slots(3, first_id=128, tokens=[4, 7]))
    table = params["embed"]["token"]["embedding"]
    np.testing.assert_array_equal(params["adapters"]["embed"]["token"]["prompt"], table[jnp.array([4, 7, 4])])
    noise = create(model, Slots(400, first_id=128))["adapters"]["embed"]["token"]["prompt"]
    np.testing.assert_allclose(noise.std(), table.std(), rtol=0.05)


def test_slots_that_make_no_sense_are_told_at_once():
    with pytest.raises(AdapterError, match=r"(?s)3 problem.*n_slots=0.*first_id=-1.*neither a prompt nor a prefix"):
        Slots(0, first_id=-1, has_prompt=False)
    with pytest.raises(AdapterError, match=r"(?s)2 problem.*tokens begin a prompt.*rule \('.\*', 2\) must be"):
        Slots(1, first_id=1, prefix=[(".*", 2)], tokens=[1])
    model = gpt2()
    with pytest.raises(AdapterError, match="first_id=11 is a row of embed/token; use 128, or more"):
        create(model, Slots(2, first_id=11))
    with pytest.raises(AdapterError, match=r"tokens have \[900\], and embed/token has 128 rows"):
        create(model, Slots(2, first_id=128, tokens=[900]))
    wrong = Slots(2, first_id=128, table="embed/tokne", prefix=[(".*final_norm", True), (".*", False)])
    with pytest.raises(AdapterError, match=r"(?s)2 problem.*there is embed/token, embed/pos.*final_norm \(Norm\) can"):
        create(model, wrong)
    with pytest.raises(paths.RuleError, match=r"'.*atention/key' matches nothing; nearest"):
        create(model, Slots(2, first_id=128, prefix=[(".*atention/key", True), (".*", False)]))
    settings = Slots(2, first_id=9, prefix=[("early", True), (".*", False)], table="late")
    with pytest.raises(AdapterError, match="early has a prefix and is called before 'late'"):
        run(Backwards(), create(Backwards(), settings), settings, TOKENS)


class Backwards(nn.Module):
    """Keys before the tokens are known."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(2, name="early")(jnp.ones((2, 3, 2))) + nn.Embed(9, 2, name="late")(tokens)


def test_a_batch_grows_at_the_slots():
    insert = InsertSlots(Slots(2, first_id=50), at=1, fill={"rank": 7})
    out = insert(
        {
            "tokens": np.array([[1, 2, 3], [4, 5, 0]]),
            "mask": np.array([[True, True, True], [True, True, False]]),
            "targets": np.array([[2, 3, 9], [5, 9, 0]]),
            "weight": np.array([1.0, 0.5], np.float32),
            "positions": np.array([[0, 1, 2], [0, 1, 0]]),
            "documents": np.array([[3, 3, 3], [1, 1, 0]]),
            "token_types": np.array([[0, 1, 1], [0, 1, 0]]),
            "rank": np.array([[1, 1, 1], [2, 2, 2]]),
            "id": np.array([10, 11]),
        }
    )
    expected = {
        "tokens": [[1, 50, 51, 2, 3], [4, 50, 51, 5, 0]],
        "mask": [[True] * 5, [True] * 4 + [False]],
        "targets": [[2, 0, 0, 3, 9], [5, 0, 0, 9, 0]],
        "weight": [[1, 0, 0, 1, 1], [0.5, 0, 0, 0.5, 0.5]],
        "positions": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 2]],
        "documents": [[3] * 5, [1] * 4 + [0]],
        "token_types": [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]],
        "rank": [[1, 7, 7, 1, 1], [2, 7, 7, 2, 2]],
        "id": [10, 11],
    }
    assert {key: value.tolist() for key, value in out.items()} == expected
    assert out["mask"].dtype == bool
    assert out["weight"].dtype == np.float32


def test_an_example_grows_like_a_batch():
    insert = InsertSlots(Slots(1, first_id=50), at=3, place_keys=["label"])
    out = insert({"tokens": np.array([7, 8, 9]), "label": np.array([1, 3])})
    assert out["tokens"].tolist() == [7, 8, 9, 50]
    assert out["label"].tolist() == [1, 4]
    assert insert.is_batched
    tagged = InsertSlots(Slots(1, first_id=50))({"tokens": np.array([7, 8]), "label": np.array([1, 3])})
    assert (tagged["label"].tolist(), tagged["weight"].tolist()) == ([0, 1, 3], [0.0, 1.0, 1.0])


def test_a_decoders_targets_do_not_grow():
    tokens, targets = np.array([[7, 8]]), np.array([[1, 2]])
    out = InsertSlots(PROMPT)({"tokens": tokens, "decoder_tokens": targets, "targets": targets, "weight": targets})
    assert out["tokens"].tolist() == [[128, 129, 7, 8]]
    assert all(out[key] is targets for key in ("decoder_tokens", "targets", "weight"))


def test_batches_that_cannot_have_slots():
    with pytest.raises(JaxdlError) as error:
        InsertSlots(PROMPT, at=4)({"tokens": TOKENS, "documents": np.array([[1, 1, 2], [1, 1, 0]]), "odd": TOKENS})
    for text in ("3 problem(s)", "at=4 must lie within the 3", "odd has a value a token", "packs several documents"):
        assert text in str(error.value)
