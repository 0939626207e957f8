"""Tokenizers: round trips, rows, truncation as the Rust library and transformers do it, files, errors."""

import builtins
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.text import ByteTokenizer, Tokenizer, check_fits
from jaxdl.data.text.rows import split_budget
from jaxdl.errors import JaxdlError

TEXTS = ["The cat sat on the mat.", "A dog runs in the park!", "naïve café über 日本 🙂", "numbers 123 and 4567"] * 3
BYTE_LEVEL = Tokenizer.train(["a"], vocab_size=260)
VOCAB = {"byte_level": 330, "bpe": 120, "wordpiece": 140}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: Tokenizer.train(TEXTS, kind=kind, vocab_size=size) for kind, size in VOCAB.items()}


@pytest.mark.parametrize("kind", VOCAB)
def test_training_gives_what_was_asked_for(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.vocab_size <= VOCAB[kind]
    assert {"pad", "mask"} <= set(tokenizer.special)
    for text in TEXTS[:4]:
        decoded = tokenizer.decode(tokenizer.encode(text))
        assert decoded == (text if kind != "wordpiece" else decoded)
        assert not np.isin(tokenizer.encode(text), tokenizer.special_ids).any()
    assert tokenizers["wordpiece"].decode(tokenizers["wordpiece"].encode("The CAT")) == "the cat"


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_bytes_hold_every_text(text):
    for tokenizer in (ByteTokenizer(), BYTE_LEVEL):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int32
    assert len(ByteTokenizer().encode(text)) == len(text.encode())


@pytest.mark.parametrize("kind", [*VOCAB, "bytes"])
def test_rows_are_the_single_texts_padded(tokenizers, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else tokenizers[kind]
    rows = tokenizer.encode_batch(TEXTS[:4], 80)
    for i, text in enumerate(TEXTS[:4]):
        real = rows["tokens"][i][rows["mask"][i]]
        inside = real[~np.isin(real, tokenizer.special_ids)]
        np.testing.assert_array_equal(inside, tokenizer.encode(text))
        assert (rows["tokens"][i][~rows["mask"][i]] == tokenizer.id_of("pad")).all()
        assert (np.diff(rows["mask"][i].astype(int)) <= 0).all()
    framed = "cls" in tokenizer.special
    assert (rows["tokens"][0][0] == tokenizer.special.get("cls")) == framed


def leaves_nothing(tokenizer, first, second, length, truncation):
    """The Rust library may cut a text to nothing; here that is an error."""
    sizes = [len(tokenizer.encode(text)) for text in (first, second)]
    cut = {"only_first": 0, "only_second": 1}.get(truncation)
    if cut is not None and sizes[1 - cut] + 4 > length:
        with pytest.raises(JaxdlError, match="use a greater length"):
            tokenizer.encode_batch([first], length, pairs=[second], truncation=truncation)
        return True
    return False


@pytest.mark.parametrize("length", [5, 8, 13, 40])
@pytest.mark.parametrize("truncation", ["longest_first", "only_first", "only_second"])
def test_truncation_is_that_of_the_rust_library(tokenizers, truncation, length):
    backend = Tokenizer.train(TEXTS, kind="wordpiece", vocab_size=140).backend
    tokenizer = tokenizers["wordpiece"]
    firsts, seconds = ["the cat sat on the mat", "dog"], ["a dog", "the park in the park the park"]
    for first, second in zip(firsts, seconds, strict=True):
        backend.enable_truncation(length, strategy=truncation)
        try:
            expected = backend.encode(first, second).ids
        except Exception:
            with pytest.raises(JaxdlError, match="use a greater length"):
                tokenizer.encode_batch([first], length, pairs=[second], truncation=truncation)
            continue
        if leaves_nothing(tokenizer, first, second, length, truncation):
            continue
        rows = tokenizer.encode_batch([first], length, pairs=[second], truncation=truncation)
        assert rows["tokens"][0][rows["mask"][0]].tolist() == expected


@settings(max_examples=200, deadline=None)
@given(a=st.integers(1, 30), b=st.integers(1, 30), budget=st.integers(2, 30))
def test_longest_first_takes_one_by_one_from_the_longer(a, b, budget):
    n, m = a, b
    while n + m > budget:
        n, m = (n - 1, m) if n > m else (n, m - 1) if m > n or a > b else (n - 1, m)
    kept = split_budget(a, b, budget, "longest_first", 0)
    assert sum(kept) == n + m
    assert abs(kept[0] - n) <= 1


def test_pairs_have_types_and_parts(tokenizers):
    for tokenizer in (tokenizers["wordpiece"], ByteTokenizer()):
        rows = tokenizer.encode_batch(["cat sat"], 40, pairs=["the dog"], has_details=True)
        real = rows["mask"][0]
        part, types = rows["part"][0][real], rows["token_types"][0][real]
        assert part[0] == -1
        assert part[-1] == -1
        assert types[part == 1].tolist() == [1] * (part == 1).sum()
        assert types[part == 0].tolist() == [0] * (part == 0).sum()
        assert rows["part"][0][~real].tolist() == [-1] * (~real).sum()


def test_offsets_and_word_ids_point_into_the_text(tokenizers):
    text = "naïve cat 123"
    for tokenizer in (tokenizers["wordpiece"], tokenizers["bpe"], ByteTokenizer()):
        rows = tokenizer.encode_batch([text], 60, has_details=True)
        words = text.split()
        for word_id, (first, end) in zip(rows["word_ids"][0], rows["offsets"][0], strict=True):
            if word_id >= 0:
                assert text[first:end].strip() == "" or text[first:end].strip() in words[word_id]


def test_lists_of_words_keep_their_numbers(tokenizers):
    words = ["The", "unseen", "cat"]
    for tokenizer in (*tokenizers.values(), ByteTokenizer()):
        rows = tokenizer.encode_batch([words], 60, has_details=True)
        assert sorted(set(rows["word_ids"][0]) - {-1}) == [0, 1, 2]
        real = rows["tokens"][0][rows["mask"][0]]
        assert tokenizer.decode(real).lower() == "the unseen cat"


def test_saved_and_loaded_is_the_same_and_transformers_agrees(tokenizers, tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind, tokenizer in tokenizers.items():
        folder = tokenizer.save(tmp_path / kind)
        again = Tokenizer.load(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
        assert again.special == tokenizer.special
        assert again.special_ids.tolist() == tokenizer.special_ids.tolist()
        for text in TEXTS[:4]:
            ids = tokenizer.encode(text).tolist()
            assert again.encode(text).tolist() == ids == theirs.encode(text, add_special_tokens=False)
        ours = tokenizer.encode_batch(TEXTS[:2], 12, pairs=TEXTS[1:3])
        for i in range(2):
            expected = theirs(TEXTS[i], TEXTS[i + 1], truncation="longest_first", max_length=12, padding="max_length")
            assert ours["tokens"][i].tolist() == expected["input_ids"]
            assert ours["mask"][i].astype(int).tolist() == expected["attention_mask"]
            assert theirs.pad_token_id == tokenizer.id_of("pad")


def test_bert_vocab_txt(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "café", "cafe", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    for lower in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
        theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=lower)
        ours = Tokenizer.load(tmp_path)
        for text in ("The cats!", "café cat", "the [MASK] cat"):
            rows = ours.encode_batch([text], 12)
            assert rows["tokens"][0][rows["mask"][0]].tolist() == theirs.encode(text)
    assert ours.special == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert Tokenizer.load(tmp_path / "vocab.txt").vocab_size == len(words)


def test_gpt2_and_roberta_vocab_json(tokenizers, tmp_path):
    backend = Tokenizer.train(
        TEXTS, vocab_size=330, special_tokens={"bos": "<s>", "pad": "<pad>", "eos": "</s>", "mask": "<mask>"}
    )
    model = json.loads(backend.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    plain = Tokenizer.load(tmp_path)
    for text in TEXTS[:4]:
        assert plain.encode(text).tolist() == backend.encode(text).tolist()
    assert plain.encode_batch(["cat"], 8)["mask"].sum() == len(plain.encode("cat"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    roberta = Tokenizer.load(tmp_path)
    row = roberta.encode_batch(["cat"], 12, pairs=["dog"])
    sep, cls = roberta.id_of("sep"), roberta.id_of("cls")
    expected = [cls, *plain.encode("cat"), sep, sep, *plain.encode("dog"), sep]
    assert row["tokens"][0][row["mask"][0]].tolist() == expected
    assert row["token_types"].sum() == 0
    (tmp_path / "vocab.json").write_text(json.dumps({"cat</w>": 0}))
    with pytest.raises(JaxdlError, match=r"CLIP's kind.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: Tokenizer.train(["a"], kind="wordpeice", vocab_size=99), r"kind='wordpeice' .*nearest: wordpiece"),
        (
            lambda t: Tokenizer.train(["a"], vocab_size=99),
            r"vocab_size=99 is too small for byte_level; use at least 260",
        ),
        (lambda t: Tokenizer.train([], vocab_size=300), "no text to train"),
        (lambda t: Tokenizer.train(["a"], kind="bpe", vocab_size=9, special_tokens={}), "role 'unk'"),
        (
            lambda t: Tokenizer.train(["a"], vocab_size=300, special_tokens={"padd": "x"}),
            "'padd' is unknown; nearest: pad",
        ),
        (lambda t: t.encode(""), "the text is empty"),
        (lambda t: t.encode_many(["a", ""]), "text 1 is empty"),
        (lambda t: t.encode_batch([], 8), "there are no texts"),
        (
            lambda t: t.encode_batch(["a", " "], 0, truncation="short"),
            r"(?s)3 problem.*length=0.*'short'.*text 1 is empty",
        ),
        (lambda t: t.encode_batch(["a"], 8, pairs=["b", "c"]), "1 texts and 2 pairs"),
        (lambda t: t.encode_batch(["a"], 8, truncation="only_second"), "needs pairs"),
        (lambda t: t.encode_batch(["cat sat on the"], 4, truncation="error"), r"row 0 has .* tokens, of which 2 fit"),
        (lambda t: t.id_of("bos"), r"no token of the role 'bos'; it has pad"),
        (lambda t: check_fits(t, 10), r"embedding 10 rows; use the tokenizer that the model was trained with"),
        (lambda t: Tokenizer.load("/nowhere"), "holds no tokenizer"),
        (lambda t: ByteTokenizer(-1), "n_sentinels=-1"),
    ],
)
def test_errors_name_value_rule_and_remedy(tokenizers, call, message):
    with pytest.raises(JaxdlError, match=message):
        call(tokenizers["wordpiece"])


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(JaxdlError, match=r"tokenizer\.json|holds no readable tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(JaxdlError, match="is not a JSON object"):
        Tokenizer.load(tmp_path)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(JaxdlError, match=r"pip install 'jaxdl\[text\]'"):
        Tokenizer.train(["a"], vocab_size=300)
    assert ByteTokenizer().encode("a").tolist() == [97]
