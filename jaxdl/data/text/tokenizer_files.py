"""The files of tokenizers: tokenizer.json, BERT's vocab.txt, GPT-2's and RoBERTa's vocab.json and merges.txt."""

import json
from pathlib import Path
from typing import Any

from jaxdl.errors import JaxdlError

# role -> the usual spellings, where no tokenizer_config.json tells
_USUAL = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "<|startoftext|>"),
    "eos": ("</s>", "<|endoftext|>"),
}


def import_tokenizers() -> Any:
    """The library, or the command that installs it.

    Raises:
      JaxdlError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise JaxdlError(
            "subword tokenizers need the library `tokenizers`: pip install 'jaxdl[text]'; or use ByteTokenizer, which"
            " needs nothing."
        ) from None
    return tokenizers


def load_backend(path: Path) -> tuple[Any, dict[str, str]]:
    """Reads a tokenizer; see `Tokenizer.load`.

    Returns:
      `(tokenizers.Tokenizer, role -> token)`.

    Raises:
      JaxdlError: see `Tokenizer.load`.
    """
    library = import_tokenizers()
    folder = path if path.is_dir() else path.parent
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= _read_json(folder / name)
    try:
        backend = _read(library, path, folder, config)
    except JaxdlError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise JaxdlError(f"{path} holds no readable tokenizer: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend, _roles(backend, config)


def _read(library: Any, path: Path, folder: Path, config: dict[str, Any]) -> Any:
    files = {name: folder / name for name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")}
    if path.is_file() and path.suffix == ".json" and path.name not in ("vocab.json", "tokenizer_config.json"):
        return library.Tokenizer.from_file(str(path))
    if path.is_dir() and files["tokenizer.json"].is_file():
        return library.Tokenizer.from_file(str(files["tokenizer.json"]))
    if files["vocab.txt"].is_file() and path in (folder, files["vocab.txt"]):
        return _bert(library, files["vocab.txt"], config)
    if files["vocab.json"].is_file() and files["merges.txt"].is_file():
        return _gpt2(library, files["vocab.json"], files["merges.txt"], config)
    raise JaxdlError(
        f"{path} holds no tokenizer: give a tokenizer.json, or a folder with tokenizer.json, vocab.txt, or vocab.json"
        " and merges.txt."
    )


def _bert(library: Any, vocab: Path, config: dict[str, Any]) -> Any:
    unk, cls, sep = (_text(config.get(f"{role}_token"), _USUAL[role][0]) for role in ("unk", "cls", "sep"))
    backend = library.Tokenizer(library.models.WordPiece.from_file(str(vocab), unk_token=unk))
    backend.normalizer = library.normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    backend.decoder = library.decoders.WordPiece()
    _add_special(library, backend, config)
    set_template(library, backend, cls, sep, is_roberta=False)
    return backend


def _gpt2(library: Any, vocab: Path, merges: Path, config: dict[str, Any]) -> Any:
    words = _read_json(vocab)
    if any(word.endswith("</w>") for word in words):
        raise JaxdlError(
            f"{vocab} is of CLIP's kind, which these two files do not describe wholly; write a tokenizer.json with"
            " transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    backend = library.Tokenizer(library.models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    backend.decoder = library.decoders.ByteLevel()
    _add_special(library, backend, config)
    if "cls_token" in config or str(config.get("tokenizer_class", "")).startswith(("Roberta", "Bart")):
        cls, sep = _text(config.get("cls_token"), "<s>"), _text(config.get("sep_token"), "</s>")
        config |= {"cls_token": cls, "sep_token": sep}
        set_template(library, backend, cls, sep, is_roberta=True)
    return backend


def _add_special(library: Any, backend: Any, config: dict[str, Any]) -> None:
    named = [_text(config.get(f"{role}_token"), None) for role in _USUAL]
    usual = [token for tokens in _USUAL.values() for token in tokens]
    there = [token for token in [*named, *usual] if token and backend.token_to_id(token) is not None]
    backend.add_special_tokens([library.AddedToken(token, special=True) for token in dict.fromkeys(there)])


def set_template(library: Any, backend: Any, cls: str, sep: str, *, is_roberta: bool) -> None:
    """Makes `encode` put `cls` before and `sep` behind each text; RoBERTa's pairs have two `sep` between them."""
    between = f"{sep} {sep} $B {sep}" if is_roberta else f"{sep} $B:1 {sep}:1"
    ids = [(token, backend.token_to_id(token)) for token in (cls, sep)]
    if any(index is None for _, index in ids):
        raise JaxdlError(f"{cls} or {sep} is not in the vocabulary; name the tokens in tokenizer_config.json.")
    backend.post_processor = library.processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {between}", special_tokens=ids
    )


def _roles(backend: Any, config: dict[str, Any]) -> dict[str, str]:
    roles: dict[str, str] = {}
    for role, usual in _USUAL.items():
        given = _text(config.get(f"{role}_token"), None)
        candidates = [given] if given else usual
        token = next((token for token in candidates if token and backend.token_to_id(token) is not None), None)
        if token is not None:
            roles[role] = token
    return roles


def _text(token: Any, default: str | None) -> Any:
    """Configs spell a token as text, or as a dict with its content."""
    return (token.get("content") if isinstance(token, dict) else token) or default


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise JaxdlError(f"{path} is not readable JSON ({error}); restore it.") from None
    if not isinstance(content, dict):
        raise JaxdlError(f"{path} is not a JSON object; restore it.")
    return content
