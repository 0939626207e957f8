"""Rows of one length out of encodings: what to keep where a row is too long, padding, details."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest

TRUNCATIONS = ("longest_first", "only_first", "only_second", "error")


def check_rows(texts: Sequence[Any], pairs: Sequence[Any] | None, length: int, n_special: int, truncation: str) -> None:
    """Refuses what makes no rows, all problems at once.

    Raises:
      JaxdlError: see `Tokenizer.encode_batch`.

    Example:
      >>> check_rows(["a", ""], None, 8, 2, "error")
      Traceback (most recent call last):
      jaxdl.errors.JaxdlError: encode_batch: 1 problem(s)
        - text 1 is empty; drop rows without text.
    """
    problems = []
    if length < n_special + 1:
        problems.append(
            f"length={length} must be at least {n_special + 1}: {n_special} special tokens and one of text."
        )
    if truncation not in TRUNCATIONS:
        problems.append(
            f"truncation={truncation!r} is unknown; nearest: {', '.join(nearest(truncation, TRUNCATIONS))}."
        )
    if len(texts) == 0:
        problems.append("there are no texts; give at least one.")
    if pairs is not None and len(pairs) != len(texts):
        problems.append(f"there are {len(texts)} texts and {len(pairs)} pairs; give one second text each.")
    if truncation == "only_second" and pairs is None:
        problems.append("truncation='only_second' needs pairs; use 'longest_first'.")
    for what, column in (("text", texts), ("pair", pairs or ())):
        empty = [i for i, text in enumerate(column) if _is_empty(text)]
        if empty:
            others = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
            problems.append(f"{what} {empty[0]}{others} is empty; drop rows without text.")
    if problems:
        raise JaxdlError.listing("encode_batch", problems)


def _is_empty(text: Any) -> bool:
    return not text.strip() if isinstance(text, str) else len(text) == 0


def split_budget(n_first: int, n_second: int, budget: int, truncation: str, row: int) -> tuple[int, int]:
    """How many tokens of a first and a second text are kept.

    Args:
      n_first, n_second: how many there are.
      budget: how many fit.
      truncation: one of `TRUNCATIONS`; "longest_first" takes from the longer text until both are equal.
      row: for the message.

    Raises:
      JaxdlError: it cannot be made to fit.

    Example:
      >>> split_budget(10, 3, 8, "longest_first", 0), split_budget(10, 9, 8, "longest_first", 0)
      ((5, 3), (4, 4))
    """
    if n_first + n_second <= budget:
        return n_first, n_second
    if truncation == "longest_first":
        short = min(n_first, n_second, budget // 2)
        return (short, budget - short) if n_first <= n_second else (budget - short, short)
    kept = (budget - n_second, n_second) if truncation == "only_first" else (n_first, budget - n_first)
    if truncation == "error" or min(kept) < 1:
        raise JaxdlError(
            f"row {row} has {n_first} and {n_second} tokens, of which {budget} fit (truncation={truncation!r});"
            " use a greater length, or truncation='longest_first'."
        )
    return kept


def to_arrays(rows: Sequence[Any], length: int, pad_id: int, *, has_details: bool) -> dict[str, np.ndarray]:
    """Pads encodings (with `ids`, `type_ids`, `offsets`, `word_ids`, `sequence_ids`) on the right."""
    shape = (len(rows), length)
    tokens, mask, types = np.full(shape, pad_id, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32)
    arrays: dict[str, np.ndarray] = {"tokens": tokens, "mask": mask, "token_types": types}
    for i, row in enumerate(rows):
        n = len(row.ids)
        tokens[i, :n], mask[i, :n], types[i, :n] = row.ids, True, row.type_ids
    if has_details:
        offsets = np.zeros((*shape, 2), np.int32)
        word_ids, part = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        for i, row in enumerate(rows):
            n = len(row.ids)
            offsets[i, :n] = row.offsets
            word_ids[i, :n] = [-1 if word is None else word for word in row.word_ids]
            part[i, :n] = [-1 if sequence is None else sequence for sequence in row.sequence_ids]
        arrays |= {"offsets": offsets, "word_ids": word_ids, "part": part}
    return arrays
