"""Text as its UTF-8 bytes: a tokenizer with no vocabulary to learn and no dependency."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdl.data.text.rows import check_rows, split_budget, to_arrays
from jaxdl.data.text.tokenizer import id_of
from jaxdl.errors import JaxdlError

_ROLES = ("pad", "bos", "eos", "mask", "cls", "sep")


class ByteTokenizer:
    """Ids 0 .. 255 are bytes, then come the special tokens and sentinels; same methods as `Tokenizer`.

    Args:
      n_sentinels: ids at the end for `corrupt_spans`.

    Attributes:
      special: role -> id: pad 256, bos 257, eos 258, mask 259, cls 260, sep 261.
      special_ids: every id from 256 on.
      vocab_size: 262 and the sentinels.

    Source: Xue et al. 2022, "ByT5", arXiv:2105.13626 (ids in another order).

    Example:
      >>> tokenizer = ByteTokenizer()
      >>> tokenizer.encode("Aé").tolist(), tokenizer.decode([65, 258])
      ([65, 195, 169], 'A')
      >>> tokenizer.encode_batch(["AB"], 6)["tokens"].tolist()
      [[260, 65, 66, 261, 256, 256]]
    """

    def __init__(self, n_sentinels: int = 0) -> None:
        if n_sentinels < 0:
            raise JaxdlError(f"n_sentinels={n_sentinels} must not be negative.")
        self.special = {role: 256 + i for i, role in enumerate(_ROLES)}
        self.vocab_size = 256 + len(_ROLES) + n_sentinels
        self.special_ids = np.arange(256, self.vocab_size, dtype=np.int32)

    def id_of(self, role: str) -> int:
        """As `Tokenizer.id_of`."""
        return id_of(self, role)

    def encode(self, text: str) -> np.ndarray:
        """The bytes of a text as int32 (n,).

        Raises:
          JaxdlError: an empty text.
        """
        if not text:
            raise JaxdlError("the text is empty; drop empty documents before encoding.")
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts."""
        return [self.encode(text) for text in texts]

    def encode_batch(
        self,
        texts: Sequence[Any],
        length: int,
        *,
        pairs: Sequence[Any] | None = None,
        truncation: str = "longest_first",
        has_details: bool = False,
    ) -> dict[str, np.ndarray]:
        """As `Tokenizer.encode_batch`: `cls text sep`, or `cls text sep pair sep`; offsets count characters."""
        n_special = 2 if pairs is None else 3
        check_rows(texts, pairs, length, n_special, truncation)
        rows = []
        for i, text in enumerate(texts):
            parts = [_piece(text, 0)] + ([] if pairs is None else [_piece(pairs[i], 1)])
            sizes = [len(part.ids) for part in parts] + [0]
            keep = split_budget(sizes[0], sizes[1], length - n_special, truncation, i)
            rows.append(self._framed([part.cut(n) for part, n in zip(parts, keep, strict=False)]))
        return to_arrays(rows, length, self.special["pad"], has_details=has_details)

    def _framed(self, parts: Sequence["_Piece"]) -> "_Piece":
        row = _special(self.special["cls"], 0)
        for number, part in enumerate(parts):
            row = row.join(part).join(_special(self.special["sep"], number))
        return row

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        """The text of ids (n,); bytes that are no UTF-8 become U+FFFD. Special tokens, which are no bytes, show as
        `<pad>` and so on with `skip_special=False`."""
        ids, names = np.asarray(ids).tolist(), {index: role for role, index in self.special.items()}
        shown = [bytes([i]) if i < 256 else b"" if skip_special else self._name(i, names) for i in ids]
        return b"".join(shown).decode(errors="replace")

    def _name(self, index: int, names: dict[int, str]) -> bytes:
        first = 256 + len(_ROLES)
        return f"<{names[index] if index in names else f'extra_id_{index - first}'}>".encode()

    def token(self, index: int) -> str:
        """What an id stands for."""
        return self.decode([index], skip_special=False)


class _Piece(NamedTuple):
    """What `rows.to_arrays` reads of an encoding."""

    ids: list[int]
    type_ids: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    sequence_ids: list[int | None]

    def cut(self, n: int) -> "_Piece":
        return _Piece(self.ids[:n], self.type_ids[:n], self.offsets[:n], self.word_ids[:n], self.sequence_ids[:n])

    def join(self, other: "_Piece") -> "_Piece":
        return _Piece(
            self.ids + other.ids,
            self.type_ids + other.type_ids,
            self.offsets + other.offsets,
            self.word_ids + other.word_ids,
            self.sequence_ids + other.sequence_ids,
        )


def _special(index: int, number: int) -> _Piece:
    return _Piece([index], [number], [(0, 0)], [None], [None])


def _piece(text: str | Sequence[str], number: int) -> _Piece:
    """A text is cut into words at blanks; of a list of words each but the first gets a blank before it."""
    row, word = _Piece([], [], [], [], []), 0
    is_text = isinstance(text, str)
    for i, chunk in enumerate([text] if is_text else text):
        if not is_text and i:
            row = row.join(_Piece([32], [number], [(0, 0)], [i], [number]))
        for place, character in enumerate(chunk):
            coded = list(character.encode())
            n = len(coded)
            row.ids.extend(coded)
            row.type_ids.extend([number] * n)
            row.offsets.extend([(place, place + 1)] * n)
            row.word_ids.extend([word if is_text else i] * n)
            row.sequence_ids.extend([number] * n)
            word += is_text and character.isspace()
    return row
