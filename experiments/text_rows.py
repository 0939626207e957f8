"""What text experiments share: the size of rows and batches, and the parts of a corpus."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.text import Corpus, load_corpus, split_documents
from jaxdl.data.text import ByteTokenizer, Documents

HAVE_OWN_TEST = ("newsgroups", "tfds")


@dataclass(frozen=True)
class TextRows:
    """How documents become batches."""

    length: int = 128  # tokens of a row
    batch_size: int = 32  # rows of a global batch
    eval_batch_size: int = 64  # rows of an evaluation batch
    validation: float = 0.1  # share of the training documents held out to choose the best checkpoint by
    test: float = 0.1  # share of the documents that the last figure is measured on; not for corpora that come parted

    def problems(self) -> Iterator[str]:
        counts = ("length", "batch_size", "eval_batch_size")
        yield from (f"{name}={getattr(self, name)} must be at least 1." for name in counts if getattr(self, name) < 1)
        for name in ("validation", "test"):
            if not 0.0 < getattr(self, name) < 0.5:
                yield f"{name}={getattr(self, name)} must lie between 0 and 0.5."


def load_parts(corpus: Corpus, rows: TextRows, *, seed: int = 0) -> dict[str, Documents]:
    """The documents for `train`, `validation` and `test`; none is in two parts.

    Raises:
      JaxdlError: a corpus that is not there, or a part that is empty.
    """
    rest = load_corpus(corpus)
    if corpus.name in HAVE_OWN_TEST:
        test = load_corpus(corpus, split="test")
    else:
        rest, test = split_documents(rest, rows.test, seed)
    train, validation = split_documents(rest, rows.validation, seed + 1)
    return {"train": train, "validation": validation, "test": test}


def about(documents: Documents) -> dict[str, str]:
    """Where the documents come from, for the report."""
    return {f"text {name}": str(value)[:80] for name, value in documents.about.items()}


def byte_counts(tokenizer: Any) -> np.ndarray:
    """How many bytes of text each token stands for, (V,) int64; special tokens stand for none."""
    if isinstance(tokenizer, ByteTokenizer):
        return (np.arange(tokenizer.vocab_size) < 256).astype(np.int64)
    special = set(tokenizer.special_ids.tolist())
    # A byte-level vocabulary writes every byte as one character.
    return np.array([0 if i in special else len(tokenizer.token(i)) for i in range(tokenizer.vocab_size)])
