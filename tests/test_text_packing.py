"""Rows out of token streams: nothing lost, nothing twice, documents apart; mixtures; the same batch again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import ArraySource, Pipeline
from jaxdl.data.text import ByteTokenizer, Mixture, PackedDocuments, StreamWindows, TokenStream
from jaxdl.data.text.packing import first_fit
from jaxdl.errors import JaxdlError

SIZES = st.lists(st.integers(1, 25), min_size=1, max_size=30)


def stream_of(sizes):
    """Every token is different, so that order and multiset can be compared."""
    return TokenStream(np.arange(1, sum(sizes) + 1), np.cumsum([0, *sizes]))


def test_a_stream_is_the_documents_with_their_ends():
    tokenizer, texts = ByteTokenizer(), ["ab", "ü", "long text"]
    stream = TokenStream.build([{"text": text} for text in texts], tokenizer)
    assert len(stream) == 3
    assert stream.ids.dtype == np.uint16
    for i, text in enumerate(texts):
        document = stream.ids[stream.starts[i] : stream.starts[i + 1]]
        assert document.tolist() == [*text.encode(), tokenizer.id_of("eos")]
    bare = TokenStream.build([{"body": text} for text in texts], tokenizer, text="body", end=None)
    assert bytes(bare.ids.astype(np.uint8)).decode() == "".join(texts)


def test_a_saved_stream_is_read_from_the_disk(tmp_path):
    stream = stream_of([5, 9])
    again = TokenStream.load(stream.save(tmp_path))
    assert isinstance(again.ids, np.memmap)
    for rows in (StreamWindows, lambda s, n: PackedDocuments(s, n, pad_id=0)):
        for row in range(len(rows(stream, 4))):
            for key, value in rows(stream, 4)[row].items():
                np.testing.assert_array_equal(rows(again, 4)[row][key], value)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), length=st.integers(1, 20))
def test_every_token_but_the_first_is_a_target_once(n, length):
    stream = TokenStream(np.arange(n), np.array([0, n]))
    windows = StreamWindows(stream, length, keep_tail=True)
    rows = windows.take(np.arange(len(windows)))
    real = rows["weight"] == 1
    assert rows["targets"][real].tolist() == list(range(1, n))
    assert rows["tokens"][real].tolist() == list(range(n - 1))
    if n > length:
        whole = StreamWindows(stream, length)
        assert len(whole) == (n - 1) // length
        np.testing.assert_array_equal(whole.take(np.arange(len(whole)))["tokens"], rows["tokens"][: len(whole)])


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, length=st.integers(1, 20))
def test_packing_loses_nothing_and_keeps_documents_apart(sizes, length):
    stream = stream_of(sizes)
    packed = PackedDocuments(stream, length, pad_id=0)
    rows = packed.take(np.arange(len(packed)))
    real = rows["documents"] > 0
    assert sorted(rows["tokens"][real]) == list(range(1, sum(sizes) + 1))
    assert (rows["tokens"][~real] == 0).all()
    assert packed.fill == real.mean()
    document_of = np.repeat(np.arange(len(sizes)), sizes)
    for i in range(len(packed)):
        for number in range(1, rows["documents"][i].max() + 1):
            here = rows["documents"][i] == number
            tokens = rows["tokens"][i][here]
            assert len(set(document_of[tokens - 1])) == 1
            assert (np.diff(tokens) == 1).all()
            assert rows["positions"][i][here].tolist() == list(range(here.sum()))
    is_target = rows["weight"] == 1
    assert (rows["targets"][is_target] == rows["tokens"][is_target] + 1).all()
    last = set(np.cumsum(sizes))
    assert sorted(rows["tokens"][is_target]) == [t for t in range(1, sum(sizes) + 1) if t not in last]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=40))
def test_first_fit_is_the_first_row_that_has_room(sizes):
    rooms, expected = [], []
    for size in sizes:
        row = next((i for i, room in enumerate(rooms) if room >= size), len(rooms))
        rooms += [10] if row == len(rooms) else []
        rooms[row] -= size
        expected.append(row)
    assert first_fit(sizes, 10).tolist() == expected


def test_packed_rows_are_pipeline_batches_by_seed_and_step():
    packed = PackedDocuments(stream_of([3, 9, 4, 7, 2, 2, 8]), 10, pad_id=0)
    by_take, by_array = (Pipeline(source, 2, seed=3) for source in (packed, packed.in_memory()))
    again = Pipeline(PackedDocuments(packed.stream, 10, pad_id=0), 2, seed=3)
    for step in (0, 5):
        for key, value in by_take[step].items():
            np.testing.assert_array_equal(value, by_array[step][key])
            np.testing.assert_array_equal(value, again[step][key])
            np.testing.assert_array_equal(value[0], packed[by_take.rows(step)[0]][key])
    with pytest.raises(IndexError):
        packed[len(packed)]


def numbered(n, first):
    return ArraySource({"x": np.arange(first, first + n)})


def test_a_mixture_has_its_proportions_everywhere_and_shows_every_row():
    sources, weights = [numbered(10, 0), numbered(40, 100), numbered(7, 200)], [0.5, 0.3, 0.2]
    mixture = Mixture(sources, weights)
    assert len(mixture) == 134  # 40 rows at a share of 0.3
    assert np.abs(mixture.counts - 134 * np.array(weights)).max() < 1
    origin = np.array([mixture.origin(row)[0] for row in range(134)])
    for n in (10, 50, 134):
        assert np.abs(np.bincount(origin[:n], minlength=3) - n * np.array(weights)).max() <= 1
    seen = mixture.take(np.arange(134))["x"]
    values, times = np.unique(seen, return_counts=True)
    assert set(values) == {*range(10), *range(100, 140), *range(200, 207)}
    for first, size in ((0, 10), (100, 40), (200, 7)):
        mine = times[(values >= first) & (values < first + 100)]
        assert mine.max() - mine.min() <= 1, size


def test_a_mixture_by_row_and_by_take_and_over_epochs():
    fast = Mixture([numbered(5, 0), numbered(9, 50)], [1, 2], seed=4)
    slow = Mixture([[{"x": i} for i in range(5)], [{"x": i} for i in range(50, 59)]], [1, 2], seed=4)
    assert not hasattr(slow, "take")
    data, rows = Pipeline(fast, 4, seed=1), Pipeline(slow, 4, seed=1)
    for step in range(9):
        assert data[step]["x"].tolist() == rows[step]["x"].tolist()
    long = np.concatenate([data[step]["x"] for step in range(len(fast) * 5)])
    assert (long >= 50).mean() == fast.counts[1] / len(fast)
    other = Mixture([numbered(5, 0), numbered(9, 50)], [1, 2], seed=5)
    assert other.take(np.arange(15))["x"].tolist() != fast.take(np.arange(15))["x"].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenStream(np.arange(0), np.array([0, 0])), "must not be 0"),
        (lambda: TokenStream(np.arange(3), np.array([0, 2])), "starts must rise from 0 to the number of tokens, 3"),
        (lambda: TokenStream.build([], ByteTokenizer()), "no documents"),
        (lambda: TokenStream.build([{"text": ""}], ByteTokenizer()), "empty"),
        (lambda: TokenStream.load("/nowhere"), "holds no token stream"),
        (lambda: StreamWindows(stream_of([4]), 0), "length=0 must be at least 1"),
        (lambda: StreamWindows(stream_of([4]), 4), r"4 tokens, fewer than one window of 4 \+ 1"),
        (lambda: PackedDocuments(stream_of([4]), 0, pad_id=0), "length=0"),
        (lambda: Mixture([[{"x": 1}], []], [1, -1]), r"(?s)2 problem.*weight 1 is -1.*source 1 has no rows"),
        (lambda: Mixture([[{"x": 1}]], [1, 1]), "1 sources and 2 weights"),
        (lambda: Mixture([[{"x": 1}]], [1], n_rows=0), "n_rows=0"),
        (
            lambda: Mixture([numbered(2, 0), ArraySource({"y": np.arange(2)})], [1, 1]).take(np.arange(4)),
            "differ in their keys",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(JaxdlError, match=message):
        call()
