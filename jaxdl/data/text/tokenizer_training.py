"""How a vocabulary is learnt: the parts of `tokenizers` that make up each kind."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxdl.data.text.tokenizer_files import import_tokenizers, set_template
from jaxdl.errors import JaxdlError


def train_backend(
    texts: Iterable[str],
    kind: str,
    vocab_size: int,
    special: Mapping[str, str],
    extra_tokens: Sequence[str],
    is_lower: bool,
) -> Any:
    """Trains a `tokenizers.Tokenizer`; arguments as for `Tokenizer.train`, already checked."""
    library = import_tokenizers()
    backend, trainer_type, options = _PARTS[kind](library, special.get("unk"))
    if is_lower:
        normal = library.normalizers
        backend.normalizer = (
            normal.BertNormalizer(lowercase=True)
            if kind == "wordpiece"
            else normal.Sequence([normal.NFD(), normal.Lowercase(), normal.StripAccents()])
        )
    tokens = list(dict.fromkeys([*special.values(), *extra_tokens]))
    trainer = trainer_type(vocab_size=vocab_size, special_tokens=tokens, show_progress=False, **options)
    seen: list[int] = []
    backend.train_from_iterator(_counted(texts, seen), trainer)
    if not seen:
        raise JaxdlError("there is no text to train a tokenizer on; give at least one document.")
    if "cls" in special and "sep" in special:
        set_template(library, backend, special["cls"], special["sep"], is_roberta=False)
    return backend


def _counted(texts: Iterable[str], seen: list[int]) -> Iterator[str]:
    for text in texts:
        if text and not seen:
            seen.append(1)
        yield text


def _byte_level(library: Any, unk: str | None) -> tuple[Any, Any, dict[str, Any]]:
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    return backend, library.trainers.BpeTrainer, {"initial_alphabet": library.pre_tokenizers.ByteLevel.alphabet()}


def _bpe(library: Any, unk: str | None) -> tuple[Any, Any, dict[str, Any]]:
    backend = library.Tokenizer(library.models.BPE(unk_token=unk))
    backend.pre_tokenizer = library.pre_tokenizers.Metaspace()
    backend.decoder = library.decoders.Metaspace()
    return backend, library.trainers.BpeTrainer, {}


def _wordpiece(library: Any, unk: str | None) -> tuple[Any, Any, dict[str, Any]]:
    backend = library.Tokenizer(library.models.WordPiece(unk_token=unk))
    backend.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    backend.decoder = library.decoders.WordPiece()
    return backend, library.trainers.WordPieceTrainer, {}


_PARTS = {"byte_level": _byte_level, "bpe": _bpe, "wordpiece": _wordpiece}
