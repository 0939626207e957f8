"""A token stream cut into rows of one length: windows of running text, or whole documents packed side by side.

Dimensions: `B` rows, `T` tokens of a row, `N` tokens of the stream.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data.sources import Arrays, ArraySource, Example, Source
from jaxdl.errors import JaxdlError


class TokenStream:
    """The ids of many documents, one after the other.

    Args:
      ids: int (N,), in memory or a memory map.
      starts: int64 (n_documents + 1,): where each document begins, and N at the end.

    Raises:
      JaxdlError: no tokens, or starts that do not rise from 0 to N.

    Example:
      >>> from jaxdl.data.text import ByteTokenizer
      >>> stream = TokenStream.build([{"text": "ab"}, {"text": "c"}], ByteTokenizer())
      >>> stream.ids.tolist(), stream.starts.tolist()
      ([97, 98, 258, 99, 258], [0, 3, 5])
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray) -> None:
        self.ids, self.starts = ids, np.asarray(starts, np.int64)
        ends_well = len(self.starts) > 1 and self.starts[0] == 0 and self.starts[-1] == len(ids)
        if len(ids) == 0 or not ends_well or (np.diff(self.starts) < 1).any():
            raise JaxdlError(f"starts must rise from 0 to the number of tokens, {len(ids)}, which must not be 0.")

    @classmethod
    def build(cls, source: Source, tokenizer: Any, *, text: str = "text", end: str | None = "eos") -> "TokenStream":
        """Encodes every document of a source.

        Args:
          source: rows with a text.
          tokenizer: `Tokenizer` or `ByteTokenizer`.
          text: the key of the text.
          end: the role of the token behind each document; None puts none.

        Raises:
          JaxdlError: an empty text, or a tokenizer without such a token.
        """
        last = [] if end is None else [tokenizer.id_of(end)]
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        parts: list[np.ndarray] = []
        for first in range(0, len(source), 1024):
            texts = [source[row][text] for row in range(first, min(first + 1024, len(source)))]
            parts += [np.append(ids, last).astype(dtype) for ids in tokenizer.encode_many(texts)]
        if not parts:
            raise JaxdlError("there are no documents; an empty corpus cannot be read.")
        return cls(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))

    def save(self, folder: str | Path) -> Path:
        """Writes `ids.npy` and `starts.npy` for `load`; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "ids.npy", self.ids)
        np.save(folder / "starts.npy", self.starts)
        (folder / "stream.json").write_text(json.dumps({"n_tokens": len(self.ids), "n_documents": len(self)}) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "TokenStream":
        """Opens what `save` wrote; the ids stay on the disk and are read where they are needed.

        Raises:
          JaxdlError: the files are not there or cut short.
        """
        try:
            ids = np.load(Path(folder) / "ids.npy", mmap_mode="r")
            return cls(ids, np.load(Path(folder) / "starts.npy"))
        except (OSError, ValueError) as error:
            raise JaxdlError(f"{folder} holds no token stream ({error}); write one with TokenStream.save.") from error

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.starts) - 1


class _Rows:
    """Random access to rows that `take` gathers."""

    def take(self, rows: np.ndarray) -> Arrays:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return {key: value[0] for key, value in self.take(np.array([row])).items()}

    def in_memory(self) -> ArraySource:
        """Every row, now: a source that can live on the device."""
        return ArraySource(self.take(np.arange(len(self))))


class StreamWindows(_Rows):
    """Windows of running text for language models: row r holds the tokens `r T .. (r + 1) T` and their successors.

    Every token of the stream but the first is a target once. The last window is filled up with weight 0.

    Args:
      stream: the tokens.
      length: T.
      keep_tail: False leaves out the last, incomplete window (fewer than T tokens), and "weight" with it.

    Returns of a row:
      "tokens" and "targets" int32 (T,); with `keep_tail` also "weight" float32 (T,).

    Raises:
      JaxdlError: a length below 1, or a stream shorter than one window.

    Example:
      >>> windows = StreamWindows(TokenStream(np.arange(8), np.array([0, 8])), 3)
      >>> len(windows), windows[1]["tokens"].tolist(), windows[1]["targets"].tolist()
      (2, [3, 4, 5], [4, 5, 6])
    """

    def __init__(self, stream: TokenStream, length: int, *, keep_tail: bool = False) -> None:
        _check_length(length)
        self.stream, self.length, self.keep_tail = stream, length, keep_tail
        n_targets = len(stream.ids) - 1
        self._n_rows = -(-n_targets // length) if keep_tail else n_targets // length
        if self._n_rows < 1:
            raise JaxdlError(
                f"the stream has {len(stream.ids)} tokens, fewer than one window of {length} + 1; use a smaller length."
            )

    def __len__(self) -> int:
        return self._n_rows

    def take(self, rows: np.ndarray) -> Arrays:
        """Rows (k,) -> arrays (k, T)."""
        place_BT = np.asarray(rows)[:, None] * self.length + np.arange(self.length + 1)
        last = len(self.stream.ids) - 1
        ids_BT = np.asarray(self.stream.ids[np.minimum(place_BT, last)]).astype(np.int32)
        found = {"tokens": ids_BT[:, :-1], "targets": ids_BT[:, 1:]}
        if self.keep_tail:
            found["weight"] = (place_BT[:, 1:] <= last).astype(np.float32)
        return {key: np.ascontiguousarray(value) for key, value in found.items()}


class PackedDocuments(_Rows):
    """Whole documents side by side in rows, each in the first row that has room, none seeing another.

    A document longer than a row is cut into pieces of T, each by itself (the target of a piece's last token is the
    first of the next). Every token stands in exactly one row.

    Args:
      stream: the tokens.
      length: T.
      pad_id: the token that fills up rows.

    Returns of a row:
      "tokens", "targets", "documents" (1, 2, ... within the row, 0 at padding), "positions" (from 0 in each document)
      int32 (T,); "weight" float32 (T,): 0 at padding and at the last token of a document, which has no successor.

    Raises:
      JaxdlError: a length below 1.

    Source: Krell et al. 2021, "Efficient sequence packing without cross-contamination", arXiv:2107.02027.

    Example:
      >>> packed = PackedDocuments(TokenStream(np.array([5, 6, 7, 8, 9]), np.array([0, 3, 5])), 6, pad_id=0)
      >>> packed[0]["tokens"].tolist(), packed[0]["documents"].tolist(), packed[0]["weight"].tolist()
      ([5, 6, 7, 8, 9, 0], [1, 1, 1, 2, 2, 0], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    """

    def __init__(self, stream: TokenStream, length: int, *, pad_id: int) -> None:
        _check_length(length)
        self.stream, self.length, self.pad_id = stream, length, pad_id
        firsts, ends = _cut(stream.starts, length)
        row_of = first_fit(np.minimum(ends - firsts, length), length)
        by_row = np.argsort(row_of, kind="stable")
        self._firsts, self._ends = firsts[by_row], ends[by_row]
        self._bounds = np.searchsorted(row_of[by_row], np.arange(row_of.max() + 2))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def fill(self) -> float:
        """The share of places that hold a token."""
        return len(self.stream.ids) / (len(self) * self.length)

    def take(self, rows: np.ndarray) -> Arrays:
        """Rows (k,) -> arrays (k, T)."""
        shape = (len(rows), self.length)
        found = {key: np.zeros(shape, np.int32) for key in ("tokens", "targets", "documents", "positions")}
        found["tokens"][:], found["targets"][:] = self.pad_id, self.pad_id
        found["weight"] = np.zeros(shape, np.float32)
        for i, row in enumerate(np.asarray(rows).tolist()):
            place = 0
            for number, piece in enumerate(range(self._bounds[row], self._bounds[row + 1]), 1):
                place += self._fill(found, i, place, number, int(self._firsts[piece]), int(self._ends[piece]))
        return found

    def _fill(self, found: Arrays, i: int, place: int, number: int, first: int, end: int) -> int:
        """Writes one piece; `end` is that of its document, which tells whether the last token has a successor."""
        n = min(end - first, self.length)
        there, n_targets = slice(place, place + n), min(n, end - first - 1)
        known = slice(place, place + n_targets)
        found["tokens"][i, there] = self.stream.ids[first : first + n]
        found["targets"][i, known] = self.stream.ids[first + 1 : first + 1 + n_targets]
        found["documents"][i, there] = number
        found["positions"][i, there] = np.arange(n)
        found["weight"][i, known] = 1
        return n


def _check_length(length: int) -> None:
    if length < 1:
        raise JaxdlError(f"length={length} must be at least 1: the tokens of a row.")


def _cut(starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first token of each piece, and the end of its document."""
    n_pieces = -(-np.diff(starts) // length)
    within = np.arange(n_pieces.sum()) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    return np.repeat(starts[:-1], n_pieces) + within * length, np.repeat(starts[1:], n_pieces)


def first_fit(sizes: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """Gives each item to the first row that still has room, in O(n log n) by a tree of the greatest room.

    Args:
      sizes: int (n,), each in 1 .. capacity.
      capacity: of a row.

    Returns:
      int64 (n,), the rows 0, 1, ...

    Example:
      >>> first_fit([3, 3, 1, 2], 4).tolist()
      [0, 1, 0, 2]
    """
    n_leaves = 1 << max(len(sizes) - 1, 1).bit_length()
    room = [capacity] * (2 * n_leaves)
    rows = np.empty(len(sizes), np.int64)
    for i, size in enumerate(np.asarray(sizes).tolist()):
        node = 1
        while node < n_leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        rows[i] = node - n_leaves
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
