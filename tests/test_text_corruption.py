"""Masking and span corruption: shares within binomial bounds, invariants exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import ArraySource, Pipeline
from jaxdl.data.text import ByteTokenizer, Tokenizer, corrupt_spans, mask_tokens, sentinel_ids, span_lengths
from jaxdl.errors import JaxdlError

TOKENIZER = ByteTokenizer(n_sentinels=30)
RNG = np.random.default_rng(0)


def rows(n=400, length=64):
    tokens = RNG.integers(32, 127, (n, length)).astype(np.int32)
    tokens[:, 0], tokens[:, 40] = TOKENIZER.id_of("cls"), TOKENIZER.id_of("sep")
    tokens[:, 50:] = TOKENIZER.id_of("pad")
    return {"tokens": tokens, "mask": np.broadcast_to(np.arange(length) < 50, tokens.shape), "label": np.arange(n)}


def within(count, n, share):
    """Five standard deviations of a binomial: wrong once in two million."""
    return abs(count - n * share) < 5 * np.sqrt(n * share * (1 - share))


def test_the_shares_are_fifteen_and_eighty_ten_ten():
    batch = rows()
    out = mask_tokens(TOKENIZER)(batch, np.random.default_rng(1))
    open_, chosen = ~np.isin(batch["tokens"], TOKENIZER.special_ids), out["weight"] == 1
    assert within(chosen.sum(), open_.sum(), 0.15)
    masked = chosen & (out["tokens"] == TOKENIZER.id_of("mask"))
    changed = chosen & ~masked & (out["tokens"] != out["targets"])
    kept = chosen & (out["tokens"] == out["targets"])
    assert within(masked.sum(), chosen.sum(), 0.8)
    assert within(changed.sum(), chosen.sum(), 0.1 * 255 / 256)
    assert within(kept.sum(), chosen.sum(), 0.1 + 0.1 / 256)


def test_special_tokens_padding_and_the_unchosen_are_never_touched():
    batch = rows()
    before = batch["tokens"].copy()
    out = mask_tokens(TOKENIZER, probability=0.9)(batch, np.random.default_rng(2))
    special = np.isin(before, TOKENIZER.special_ids)
    assert (out["weight"][special] == 0).all()
    assert (out["tokens"][special] == before[special]).all()
    assert (out["tokens"][out["weight"] == 0] == before[out["weight"] == 0]).all()
    np.testing.assert_array_equal(out["targets"], before)
    np.testing.assert_array_equal(batch["tokens"], before)
    new = out["tokens"][~special]
    assert (np.isin(new, TOKENIZER.special_ids) == (new == TOKENIZER.id_of("mask"))).all()
    hidden = mask_tokens(TOKENIZER, probability=0.9)({**batch, "mask": np.zeros_like(batch["mask"])}, RNG)
    assert hidden["weight"].sum() == 0


def test_whole_words_are_chosen_together_at_the_same_share():
    tokens = np.full((300, 60), 65, np.int32)
    tokens[:, 0] = TOKENIZER.id_of("cls")
    word_ids = np.broadcast_to(np.repeat(np.arange(-1, 19), [1] + [1, 4] * 9 + [14]), tokens.shape)
    example = {"tokens": tokens, "word_ids": word_ids}
    out = mask_tokens(TOKENIZER, whole_words=True)(example, np.random.default_rng(3))
    assert "word_ids" not in out
    by_word = [out["weight"][:, word_ids[0] == word] for word in range(19)]
    for chosen in by_word:
        assert (chosen == chosen[:, :1]).all()
    assert within(sum(chosen[:, 0].sum() for chosen in by_word), 300 * 19, 0.15)
    assert out["weight"][:, 0].sum() == 0


def test_it_serves_examples_and_batches_and_repeats_itself():
    source = ArraySource(rows(16))
    by_row = Pipeline(source, 8, seed=1, transforms=[mask_tokens(TOKENIZER)])
    by_batch = Pipeline(source, 8, seed=1, batch_transforms=[mask_tokens(TOKENIZER)])
    for data in (by_row, by_batch):
        again = Pipeline(source, 8, 1, transforms=data.transforms, batch_transforms=data.batch_transforms)
        for key in data[3]:
            np.testing.assert_array_equal(data[3][key], again[3][key])
        assert (data[3]["weight"] != data[5]["weight"]).any()  # two epochs of two steps: other tokens each time
        parts = [data.shard(i, 2)[3] for i in range(2)]
        np.testing.assert_array_equal(np.concatenate([part["tokens"] for part in parts]), data[3]["tokens"])


@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 120), probability=st.floats(0.05, 0.6), mean=st.floats(1, 6), seed=st.integers(0, 99))
def test_spans_taken_out_can_be_put_back(n, probability, mean, seed):
    tokens = np.random.default_rng(seed).integers(0, 256, n).astype(np.int32)
    n_input, n_target, n_spans = span_lengths(n, probability=probability, mean_span=mean)
    sentinels = np.arange(1000, 1000 + n_spans)
    corrupt = corrupt_spans(
        sentinels, pad_id=256, eos_id=258, input_length=n_input + 2, target_length=n_target + 1,
        probability=probability, mean_span=mean,
    )  # fmt: skip
    out = corrupt({"tokens": tokens}, np.random.default_rng(seed))
    inputs = out["tokens"][out["mask"]].tolist()
    targets = out["targets"][out["weight"] == 1].tolist()
    assert (len(inputs), len(targets)) == (n_input, n_target)
    assert inputs[-1] == targets[-1] == 258
    spans, current = {}, None
    for token in targets[:-1]:
        if token >= 1000:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert list(spans) == sentinels.tolist()
    assert min(map(len, spans.values())) >= 1
    back = [t for token in inputs[:-1] for t in (spans[token] if token >= 1000 else [token])]
    assert back == tokens.tolist()
    assert out["decoder_tokens"].tolist() == [256, *out["targets"][:-1].tolist()]
    assert set(out["tokens"][~out["mask"]].tolist()) == {256}


def test_spans_leave_padding_out_and_keep_other_keys():
    sentinels = sentinel_ids(TOKENIZER, 5)
    corrupt = corrupt_spans(sentinels, pad_id=256, eos_id=258, input_length=30, target_length=12)
    example = {"tokens": np.arange(30), "mask": np.arange(30) < 20, "token_types": np.zeros(30), "label": 3}
    out = corrupt(example, np.random.default_rng(0))
    plain = corrupt({"tokens": np.arange(20)}, np.random.default_rng(0))
    np.testing.assert_array_equal(out["tokens"], plain["tokens"])
    assert out["label"] == 3
    assert "token_types" not in out


def test_sentinels_of_a_trained_tokenizer():
    extra = [f"<extra_id_{i}>" for i in range(3)]
    tokenizer = Tokenizer.train(["some text"], vocab_size=300, extra_tokens=extra)
    ids = sentinel_ids(tokenizer, 3)
    assert [tokenizer.token(i) for i in ids] == extra
    assert np.isin(ids, tokenizer.special_ids).all()
    with pytest.raises(JaxdlError, match="fewer than 4 sentinels"):
        sentinel_ids(tokenizer, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_tokens(TOKENIZER, probability=0), "probability=0 must be"),
        (lambda: mask_tokens(Tokenizer.train(["a"], vocab_size=300, special_tokens={"eos": "e"})), "role 'mask'"),
        (lambda: mask_tokens(TOKENIZER, whole_words=True)({"tokens": np.arange(3)}, RNG), "needs 'word_ids'"),
        (lambda: corrupt_spans([1], pad_id=0, eos_id=1, input_length=9, target_length=9, mean_span=0), "mean_span=0"),
        (
            lambda: corrupt_spans([1], pad_id=0, eos_id=1, input_length=9, target_length=9)({"tokens": [3]}, RNG),
            "has no span to take out",
        ),
        (
            lambda: corrupt_spans([1], pad_id=0, eos_id=1, input_length=9, target_length=9)({"tokens": range(40)}, RNG),
            "needs 2 sentinels and there are 1",
        ),
        (
            lambda: corrupt_spans([1, 2], pad_id=0, eos_id=1, input_length=9, target_length=9)(
                {"tokens": range(40)}, RNG
            ),
            "input_length=9 is too short for a row of 37",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(JaxdlError, match=message):
        call()
