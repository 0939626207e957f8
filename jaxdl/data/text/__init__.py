"""Text: corpora, tokenizers, packing to rows, corruption for denoising, mixtures."""

from jaxdl.data.text.batches import encode_answers, encode_rows, encode_tags
from jaxdl.data.text.byte_tokenizer import ByteTokenizer
from jaxdl.data.text.corpora import load_brown, load_newsgroups, load_shakespeare, load_vader
from jaxdl.data.text.corruption import corrupt_spans, mask_tokens, sentinel_ids, span_lengths
from jaxdl.data.text.documents import (
    Documents,
    python_library,
    read_text_files,
    split_by_hash,
)
from jaxdl.data.text.mixture import Mixture
from jaxdl.data.text.packing import PackedDocuments, StreamWindows, TokenStream
from jaxdl.data.text.records import from_source, read_jsonl, read_parquet, read_tfds
from jaxdl.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer, check_fits
from jaxdl.data.text.word_vectors import WordVectors
from jaxdl.data.text.words import WordStream, WordWindows, split_names, split_words

__all__ = [
    "SPECIAL_TOKENS",
    "ByteTokenizer",
    "Documents",
    "Mixture",
    "PackedDocuments",
    "StreamWindows",
    "TokenStream",
    "Tokenizer",
    "WordStream",
    "WordVectors",
    "WordWindows",
    "check_fits",
    "corrupt_spans",
    "encode_answers",
    "encode_rows",
    "encode_tags",
    "from_source",
    "load_brown",
    "load_newsgroups",
    "load_shakespeare",
    "load_vader",
    "mask_tokens",
    "python_library",
    "read_jsonl",
    "read_parquet",
    "read_text_files",
    "read_tfds",
    "sentinel_ids",
    "span_lengths",
    "split_by_hash",
    "split_names",
    "split_words",
]
