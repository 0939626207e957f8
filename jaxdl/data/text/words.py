"""Running text as words: a vocabulary by frequency, and windows about each word as a function of (seed, step)."""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxdl.data.order import Order, batch_rng
from jaxdl.data.sources import Arrays
from jaxdl.errors import JaxdlError

_WORD = re.compile(r"[^\W\d_](?:[\w'’-]*\w)?")
_NAME = re.compile(r"[^\W\d]\w*")


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without marks and numbers.

    Example:
      >>> split_words("The dog's 2 well-known tricks.")
      ['the', "dog's", 'well-known', 'tricks']
    """
    return _WORD.findall(text.lower())


def split_names(text: str) -> list[str]:
    """The identifiers and words of program text, as they are spelt.

    Example:
      >>> split_names("def read_file(path): return 3.5")
      ['def', 'read_file', 'path', 'return']
    """
    return _NAME.findall(text)


@dataclass(frozen=True)
class WordStream:
    """The words of a corpus as ids in a vocabulary; made by `build`.

    Attributes:
      ids: int32 (N,), the words that are in the vocabulary, document after document.
      documents: int32 (N,), the number of each word's document, from 1.
      words: the vocabulary, the most frequent first.
      counts: int64 (V,).
    """

    ids: np.ndarray
    documents: np.ndarray
    words: tuple[str, ...]
    counts: np.ndarray

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        *,
        split: Callable[[str], Sequence[str]] = split_words,
        min_count: int = 5,
        max_words: int | None = None,
    ) -> "WordStream":
        """Counts and numbers the words of texts; rarer ones are dropped, and their neighbours move together.

        Args:
          texts: one a document; windows do not reach across documents.
          split: text -> words.
          min_count: how often a word of the vocabulary occurs at least.
          max_words: the size of the vocabulary at most.

        Raises:
          JaxdlError: no word occurs often enough.

        Example:
          >>> stream = WordStream.build(["a b a", "b c"], min_count=2)
          >>> stream.words, stream.ids.tolist(), stream.documents.tolist()
          (('a', 'b'), [0, 1, 0, 1], [1, 1, 1, 2])
        """
        number: dict[str, int] = {}
        parts = [np.array([number.setdefault(word, len(number)) for word in split(text)], np.int64) for text in texts]
        ids = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        counts, spelt = np.bincount(ids, minlength=len(number)), list(number)
        order = sorted(np.flatnonzero(counts >= min_count).tolist(), key=lambda i: (-counts[i], spelt[i]))[:max_words]
        if not order:
            raise JaxdlError(f"no word occurs min_count={min_count} times; use a smaller one, or more text.")
        place = np.full(len(number), -1, np.int32)
        place[order] = np.arange(len(order))
        documents = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), [len(part) for part in parts])
        is_known = place[ids] >= 0
        return cls(place[ids][is_known], documents[is_known], tuple(spelt[i] for i in order), counts[order])


class WordWindows:
    """Batches for `make_embedding_loss`: `data[step]` is a function of the seed and the step, as of a `Pipeline`.

    Each epoch drops frequent words anew and draws each centre's window from 1 .. `window`. What is left is cut into
    rows of `length` centres with `window` words more on either side, and the rows are shuffled. Every centre comes
    once; the number of rows is fixed, four standard deviations above what is expected, and the last are filled up with
    document 0.

    Args:
      stream: the words.
      batch_size: rows of a batch, so `batch_size * length` centres.
      length: centres of a row, T.
      window: the largest distance of a pair, W.
      subsample: t: a word of the share f stays with the probability `sqrt(t / f)`, at most 1; None keeps all.
      seed: of all of it.

    Attributes:
      n_rows: rows of an epoch.

    Raises:
      JaxdlError: sizes below 1, subsample out of range; all at once.

    Source: Mikolov et al. 2013, arXiv:1310.4546, section 2.3 (subsampling); dynamic windows as in their word2vec.

    Example:
      >>> stream = WordStream.build(["a b c d"], min_count=1)
      >>> data = WordWindows(stream, batch_size=1, length=4, window=1, subsample=None)
      >>> {key: value.tolist() for key, value in data[0].items()}["tokens"]
      [[0, 0, 1, 2, 3, 0]]
    """

    def __init__(
        self,
        stream: WordStream,
        *,
        batch_size: int,
        length: int = 16,
        window: int = 5,
        subsample: float | None = 1e-3,
        seed: int = 0,
    ) -> None:
        sizes = {"batch_size": batch_size, "length": length, "window": window}
        problems = [f"{name}={n} must be at least 1." for name, n in sizes.items() if n < 1]
        if subsample is not None and not 0 < subsample < 1:
            problems.append(f"subsample={subsample} must be greater than 0 and less than 1, such as 1e-3, or None.")
        if problems:
            raise JaxdlError.listing("word windows", problems)
        self.stream, self.batch_size, self.length, self.window, self.seed = stream, batch_size, length, window, seed
        shares = stream.counts / stream.counts.sum()
        self._stays = np.ones_like(shares) if subsample is None else np.minimum(1, np.sqrt(subsample / shares))
        expected = stream.counts @ self._stays
        spread = np.sqrt(stream.counts @ (self._stays * (1 - self._stays)))
        self.n_rows = int(np.ceil((expected + 4 * spread) / length))
        self._order = Order(self.n_rows, batch_size, seed)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def words_per_epoch(self) -> float:
        """The expected number of centres of an epoch."""
        return float(self.stream.counts @ self._stays)

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step, int64 (batch_size,)."""
        return self._order.rows(step)

    def __getitem__(self, step: int) -> Arrays:
        epochs, rows = self._order.positions(step) // self.n_rows, self._order.rows(step)
        parts = [self._gather(int(epoch), rows[epochs == epoch]) for epoch in np.unique(epochs)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _gather(self, epoch: int, rows: np.ndarray) -> Arrays:
        tokens, documents, windows = self._epoch(epoch)
        place = rows[:, None] * self.length + np.arange(self.length + 2 * self.window)
        centre = rows[:, None] * self.length + np.arange(self.length)
        return {"tokens": tokens[place], "documents": documents[place], "window": windows[centre]}

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = batch_rng(self.seed, epoch)
        stays = rng.random(len(self.stream.ids), np.float32) < self._stays.astype(np.float32)[self.stream.ids]
        n = self.n_rows * self.length
        kept = np.flatnonzero(stays)[:n]
        behind = n - len(kept) + self.window
        tokens = np.pad(self.stream.ids[kept], (self.window, behind))
        documents = np.pad(self.stream.documents[kept], (self.window, behind))
        return tokens, documents, rng.integers(1, self.window + 1, n).astype(np.int32)
