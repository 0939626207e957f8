"""Text for experiments: which corpus, which tokenizer, and the rows that come of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxdl import JaxdlError, data, parallel
from jaxdl.data import text
from jaxdl.data.text import corpora

_HINTS = ("brown", "vader", "newsgroups", "shakespeare", "files", "jsonl", "parquet")


@dataclass(frozen=True)
class Corpus:
    """Where documents come from."""

    name: Literal["python", "brown", "vader", "newsgroups", "shakespeare", "files", "jsonl", "parquet", "tfds"] = (
        "python"  # python: the source of Python's own library, on every machine
    )
    path: str | None = None  # the file, folder or archive of the corpus; the errors say how to get one
    pattern: str = "*.txt"  # with name=files: a glob of file names
    text_field: str = "text"  # with jsonl, parquet, tfds: the field of the text
    label_field: str | None = None  # with jsonl, parquet: the field of the class, a name or a whole number
    domain: str = "movies"  # with name=vader: movies, products, news or tweets
    tfds_name: str | None = None  # with name=tfds: a TensorFlow Datasets name, prepared as array_record

    def problems(self) -> Iterator[str]:
        if self.name in _HINTS and self.path is None:
            yield f"name={self.name!r} needs path; {_HOW.get(self.name, 'give the file or folder.')}"
        if self.label_field is not None and self.name not in ("jsonl", "parquet"):
            yield f"label_field={self.label_field!r} is of jsonl and parquet, not of name={self.name!r}; leave it out."
        if (self.name == "tfds") != (self.tfds_name is not None):
            yield "name='tfds' and tfds_name go together; give both or neither."
        if self.path is not None and not Path(self.path).exists():
            yield f"path={self.path!r} does not exist; {_HOW.get(self.name, 'check it.')}"


_HOW = {
    "brown": corpora.BROWN_HINT,
    "vader": corpora.VADER_HINT,
    "newsgroups": corpora.NEWSGROUPS_HINT,
    "shakespeare": corpora.SHAKESPEARE_HINT,
}


def load_corpus(corpus: Corpus, *, split: Literal["train", "test"] = "train") -> text.Documents:
    """Reads the documents of a corpus.

    Args:
      corpus: which.
      split: of "newsgroups" and "tfds", which come parted; the others are whole, see `split_documents`.

    Raises:
      JaxdlError: a corpus that is not there or not as it should be.
    """
    path = corpus.path or ""
    fields: dict[str, Any] = {"text": corpus.text_field}
    kept = {**fields, "keep": [] if corpus.label_field is None else [corpus.label_field]}
    readers = {
        "python": lambda: text.python_library(corpus.path),
        "brown": lambda: text.load_brown(path),
        "vader": lambda: text.load_vader(path, corpus.domain),
        "newsgroups": lambda: text.load_newsgroups(path, split),
        "shakespeare": lambda: text.load_shakespeare(path),
        "files": lambda: text.read_text_files(path, corpus.pattern),
        "jsonl": lambda: text.read_jsonl(path, **kept),
        "parquet": lambda: text.read_parquet(path, **kept),
        "tfds": lambda: text.read_tfds(corpus.tfds_name or "", split, data_dir=corpus.path, **fields),
    }
    documents = readers[corpus.name]()
    return documents if corpus.label_field is None else labelled(documents, corpus.label_field)


def labelled(documents: text.Documents, field: str) -> text.Documents:
    """Numbers the classes of a column: names in alphabetical order, whole numbers as they are.

    Raises:
      JaxdlError: a class that is neither, or both kinds in one column.

    Example:
      >>> documents = labelled(text.Documents({"text": ["a", "b"], "mood": ["sad", "glad"]}), "mood")
      >>> documents.columns["label"], documents.class_names
      ([1, 0], ('glad', 'sad'))
    """
    classes = documents.columns[field]
    kinds = {type(value) for value in classes}
    if kinds not in ({str}, {int}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise JaxdlError(f"label_field={field!r} holds {found}; give every row a name, or every row a whole number.")
    names = tuple(sorted(set(classes))) if str in kinds else ()
    labels = [names.index(value) for value in classes] if names else list(classes)
    columns = {name: values for name, values in documents.columns.items() if name != field}
    return text.Documents({**columns, "label": labels}, class_names=names, about=documents.about)


def split_documents(documents: text.Documents, fraction: float, seed: int) -> tuple[text.Documents, text.Documents]:
    """Holds out whole documents: whole files by the hash of their path where they have one, else rows.

    Labels keep their shares. Sentences of one Brown file stay on one side.

    Returns:
      `(train, held_out)`.

    Raises:
      JaxdlError: a fraction that leaves a side empty.
    """
    if "path" in documents.columns:
        return text.split_by_hash(documents, fraction, seed)
    labels = documents.columns.get("label")
    rows = data.split_rows(len(documents) if labels is None else np.asarray(labels), fraction, seed)
    return documents.select(rows[0]), documents.select(rows[1])


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer."""

    kind: Literal["bytes", "byte_level", "bpe", "wordpiece", "load"] = "bytes"  # bytes needs no training
    vocab_size: int = 8192  # with byte_level, bpe, wordpiece, which are trained on the training documents
    path: str | None = None  # with kind=load: a tokenizer.json or a folder of one

    def problems(self) -> Iterator[str]:
        if (self.kind == "load") != (self.path is not None):
            yield "kind='load' and path go together; give both or neither."
        if self.path is not None and not Path(self.path).exists():
            yield f"path={self.path!r} does not exist; check it."
        if self.kind in ("byte_level", "bpe", "wordpiece") and self.vocab_size < 300:
            yield f"vocab_size={self.vocab_size} must be at least 300."


def make_tokenizer(choice: TokenizerChoice, train: text.Documents, out: str | Path) -> Any:
    """Builds, trains or loads a tokenizer; a trained one is kept in the run folder and found there on resuming.

    Of many processes the first one trains it.

    Raises:
      JaxdlError: a tokenizer that cannot be read, or too small a vocabulary.
    """
    if choice.kind == "bytes":
        return text.ByteTokenizer()
    if choice.kind == "load":
        if choice.path is None:
            raise JaxdlError("kind='load' needs path.")
        return text.Tokenizer.load(choice.path)
    folder = Path(out) / "tokenizer"

    def make() -> None:
        if not (folder / "tokenizer.json").is_file():
            words = train.columns["text"]
            text.Tokenizer.train(words, kind=choice.kind, vocab_size=choice.vocab_size).save(folder)

    parallel.led("the tokenizer", make, error=JaxdlError, deadline_s=3600.0)
    return text.Tokenizer.load(folder)
