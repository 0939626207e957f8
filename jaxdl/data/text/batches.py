"""Rows that models take, encoded once: classification and regression, tagging, answers as spans.

Dimensions: `n` rows, `T` tokens of a row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdl.data.sources import ArraySource, Source
from jaxdl.data.splits import _some
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest


def encode_rows(
    source: Source,
    tokenizer: Any,
    length: int,
    *,
    text: str = "text",
    pair: str | None = None,
    keep: Sequence[str] = ("label",),
    truncation: str = "longest_first",
    has_words: bool = False,
) -> ArraySource:
    """Encodes texts, or pairs of texts, with their labels.

    Args:
      source: rows with texts.
      tokenizer: `Tokenizer` or `ByteTokenizer`.
      length: T.
      text, pair: the keys of the first and the second text.
      keep: keys of numbers to keep beside: a label, or a target such as a rating; whole numbers become int32, others
        float32.
      truncation: as for `Tokenizer.encode_batch`.
      has_words: also "word_ids", for `mask_tokens(whole_words=True)`.

    Returns:
      "tokens", "token_types" int32 (n, T), "mask" bool (n, T), and what is kept.

    Raises:
      JaxdlError: a key that the rows do not have, an empty text, a length that leaves no room.

    Example:
      >>> from jaxdl.data.text import ByteTokenizer
      >>> encode_rows([{"text": "ab", "label": 1}], ByteTokenizer(), 5).arrays["mask"].tolist()
      [[True, True, True, True, False]]
    """
    columns = _columns(source, [text, *([] if pair is None else [pair]), *keep])
    pairs = None if pair is None else columns[pair]
    arrays = tokenizer.encode_batch(columns[text], length, pairs=pairs, truncation=truncation, has_details=has_words)
    arrays = {key: value for key, value in arrays.items() if key not in ("offsets", "part")}
    return ArraySource({**arrays, **{key: _numbers(key, columns[key]) for key in keep}})


def _columns(source: Source, keys: Sequence[str]) -> dict[str, list[Any]]:
    if len(source) == 0:
        raise JaxdlError("the source has no rows; an empty split cannot be read.")
    rows = [source[row] for row in range(len(source))]
    missing = [
        f"there is no key {key!r}; nearest: {', '.join(nearest(key, rows[0]))}." for key in keys if key not in rows[0]
    ]
    if missing:
        raise JaxdlError.listing("rows of text", missing)
    return {key: [row[key] for row in rows] for key in keys}


def _numbers(key: str, values: list[Any]) -> np.ndarray:
    array = np.asarray(values)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise JaxdlError(f"{key} holds {values[0]!r}, not numbers; number the classes, or leave it out of keep.")
    return array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32)


def encode_tags(
    source: Source,
    tokenizer: Any,
    length: int,
    *,
    tag_names: Sequence[str],
    words: str = "words",
    tags: str = "tags",
) -> ArraySource:
    """Encodes sentences of words with one tag each; a word's tag stands at its first token.

    Words beyond `length` are cut off and count nowhere: choose a length that holds the longest sentence to score.

    Args:
      source: rows with a sequence of words and one of tags (names, or numbers of `tag_names`).
      tokenizer: `Tokenizer` or `ByteTokenizer`.
      length: T.
      tag_names: every tag; the label is the place in this sequence.
      words, tags: the keys.

    Returns:
      "tokens", "token_types" int32 (n, T), "mask" bool (n, T), "label" int32 (n, T), "weight" float32 (n, T): 1 at the
      first token of each word, 0 elsewhere (where the label is 0).

    Raises:
      JaxdlError: an unknown tag (with the nearest), rows with unequal numbers of words and tags, empty rows.

    Example:
      >>> from jaxdl.data.text import ByteTokenizer
      >>> rows = [{"words": ["a", "dog"], "tags": ["DET", "NOUN"]}]
      >>> tagged = encode_tags(rows, ByteTokenizer(), 8, tag_names=["DET", "NOUN"])
      >>> tagged.arrays["label"][0].tolist(), tagged.arrays["weight"][0].tolist()
      ([0, 0, 1, 0, 0, 0, 0, 0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """
    columns = _columns(source, [words, tags])
    codes = _tag_codes(columns[words], columns[tags], tag_names)
    arrays = tokenizer.encode_batch(columns[words], length, has_details=True)
    word_ids = arrays["word_ids"]
    is_first = word_ids >= 0
    is_first[:, 1:] &= word_ids[:, 1:] != word_ids[:, :-1]
    label = np.zeros(word_ids.shape, np.int32)
    for i, code in enumerate(codes):
        label[i, is_first[i]] = code[word_ids[i, is_first[i]]]
    kept = {key: arrays[key] for key in ("tokens", "mask", "token_types")}
    return ArraySource({**kept, "label": label, "weight": is_first.astype(np.float32)})


def _tag_codes(words: list[Any], tags: list[Any], tag_names: Sequence[str]) -> list[np.ndarray]:
    uneven = [i for i, (w, t) in enumerate(zip(words, tags, strict=True)) if len(w) != len(t)]
    place: dict[Any, int] = {name: i for i, name in enumerate(tag_names)} | {i: i for i in range(len(tag_names))}
    unknown = sorted({str(tag) for row in tags for tag in row if tag not in place})
    problems = [
        f"the tag {tag!r} is not in tag_names; nearest: {', '.join(nearest(tag, tag_names))}." for tag in unknown[:5]
    ]
    if uneven:
        problems.append(f"words and tags differ in number in row {_some(uneven)}; give one tag a word.")
    if problems:
        raise JaxdlError.listing("encode_tags", problems)
    return [np.array([place[tag] for tag in row], np.int32) for row in tags]


def encode_answers(
    source: Source,
    tokenizer: Any,
    length: int,
    *,
    question: str = "question",
    context: str = "context",
    start: str = "start",
    answer: str = "answer",
) -> ArraySource:
    """Encodes questions with the context that holds the answer, and where the answer stands among the tokens.

    Args:
      source: rows with a question, a context, the answer's text and the place of its first character in the context.
      tokenizer: `Tokenizer` or `ByteTokenizer`.
      length: T; a context that is too long is cut at its end.
      question, context, start, answer: the keys.

    Returns:
      "tokens", "token_types", "mask" (n, T); "label" int32 (n, 2), the first and the last token of the answer;
      "is_context" bool (n, T), the tokens that may be an answer; "weight" float32 (n,), 0 where the answer was cut off.

    Raises:
      JaxdlError: a context that does not hold the answer where it is said to.

    Example:
      >>> from jaxdl.data.text import ByteTokenizer
      >>> rows = [{"question": "who", "context": "I am", "start": 2, "answer": "am"}]
      >>> encode_answers(rows, ByteTokenizer(), 12).arrays["label"].tolist()
      [[7, 8]]
    """
    columns = _columns(source, [question, context, start, answer])
    starts, ends = _answer_places(columns[context], columns[start], columns[answer])
    arrays = tokenizer.encode_batch(
        columns[question], length, pairs=columns[context], truncation="only_second", has_details=True
    )
    is_context, offsets = arrays["part"] == 1, arrays["offsets"]
    holds_first = is_context & (offsets[..., 0] <= starts[:, None]) & (starts[:, None] < offsets[..., 1])
    holds_last = is_context & (offsets[..., 0] < ends[:, None]) & (ends[:, None] <= offsets[..., 1])
    is_whole = holds_first.any(1) & holds_last.any(1)
    last = holds_last.shape[1] - 1 - np.argmax(holds_last[:, ::-1], axis=1)
    label = np.where(is_whole[:, None], np.stack([np.argmax(holds_first, axis=1), last], 1), 0).astype(np.int32)
    kept = {key: arrays[key] for key in ("tokens", "mask", "token_types")}
    return ArraySource({**kept, "label": label, "is_context": is_context, "weight": is_whole.astype(np.float32)})


def _answer_places(contexts: list[str], starts: list[int], answers: list[str]) -> tuple[np.ndarray, np.ndarray]:
    wrong = [
        i
        for i, (text, start, answer) in enumerate(zip(contexts, starts, answers, strict=True))
        if not answer or text[start : start + len(answer)] != answer
    ]
    if wrong:
        i = wrong[0]
        found = contexts[i][starts[i] : starts[i] + len(answers[i])]
        raise JaxdlError(
            f"row {_some(wrong)}: the context holds {found!r} at character {starts[i]}, not {answers[i]!r}; count"
            " characters (not bytes) from 0."
        )
    first = np.asarray(starts)
    return first, first + np.array([len(answer) for answer in answers])
