"""Folders of sentence-transformers (Reimers & Gurevych 2019): a bare encoder, and how its tokens become one vector."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxdl.models.text_encoder import TextEncoder
from jaxdl.paths import Tree
from jaxdl.pretrained.family import find_family
from jaxdl.pretrained.folder import Pretrained, load, read_config, save
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.registry import FAMILIES

MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS = {"mean": "mean_tokens", "first": "cls_token"}


class SentenceSettings(NamedTuple):
    """What a folder says about its vectors.

    Attributes:
      pooling: "mean" over real tokens or the "first" token.
      is_normalized: vectors have length 1.
      max_tokens: rows are to be cut to so many tokens; None where the folder does not say.
    """

    pooling: str
    is_normalized: bool
    max_tokens: int | None


def read_settings(folder: str | os.PathLike[str]) -> SentenceSettings:
    """Reads modules.json, the pooling's config.json and sentence_bert_config.json.

    Args:
      folder: of sentence-transformers.

    Returns:
      The settings.

    Raises:
      PretrainedError: a file is missing or broken, or the modules are none that `head="embed"` can be.
    """
    folder = Path(folder)
    modules = _read(folder / "modules.json")
    names = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if tuple(names) not in (MODULES, MODULES[:2]):
        raise PretrainedError(f"{folder / 'modules.json'} has {names}; known are {list(MODULES)}, the last optional.")
    pooling = _read(folder / modules[1]["path"] / "config.json")
    extra = folder / "sentence_bert_config.json"
    max_tokens = _read(extra).get("max_seq_length") if extra.exists() else None
    return SentenceSettings(_pooling(pooling), len(names) == 3, max_tokens)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} of a sentence-transformers folder cannot be read: {error}.") from None


def _pooling(config: dict[str, Any]) -> str:
    modes = sorted(_modes(config))
    known = {theirs: ours for ours, theirs in _POOLINGS.items()}
    if len(modes) != 1 or modes[0] not in known:
        raise PretrainedError(f"pooling by {modes or 'nothing'} is not supported; one of {sorted(known)} is.")
    return known[modes[0]]


def _modes(config: dict[str, Any]) -> Iterator[str]:
    """Older files have a flag a mode, newer ones a name."""
    yield from (key.removeprefix("pooling_mode_") for key, is_on in config.items() if is_on is True and "_mode_" in key)
    named = config.get("pooling_mode")
    if named is not None:
        yield {"mean": "mean_tokens", "cls": "cls_token"}.get(named, str(named))


def load_sentence_encoder(folder: str | os.PathLike[str], **options: Any) -> Pretrained:
    """Loads a folder of sentence-transformers as a model with `head="embed"`.

    Args:
      folder: of sentence-transformers, around a BERT, RoBERTa or DistilBERT.
      options: of `load`.

    Returns:
      As `load`. Cut rows to `read_settings(folder).max_tokens` tokens.

    Raises:
      PretrainedError: what `load` and `read_settings` refuse.
    """
    settings = read_settings(folder)
    family = options.pop("family", None) or find_family(read_config(Path(folder)), FAMILIES)
    loaded = load(folder, family=family, architecture=family.bare, has_pooler=False, **options)
    if not isinstance(loaded.model, TextEncoder):
        raise PretrainedError(f"{folder} holds a {family.name} model, which has no sentence vectors here.")
    model = loaded.model.clone(head="embed", pooling=settings.pooling, is_normalized=settings.is_normalized)
    return loaded._replace(model=model)


def save_sentence_encoder(
    folder: str | os.PathLike[str], model: TextEncoder, params: Tree, *, max_tokens: int | None = None, **options: Any
) -> None:
    """Writes a folder that sentence-transformers and transformers load.

    Args:
      folder: new or empty.
      model: with `head="embed"`.
      params: its parameters.
      max_tokens: rows are to be cut to so many tokens; what positions allow by default.
      options: of `save`.

    Raises:
      PretrainedError: another head, or what `save` refuses.
    """
    if model.head != "embed":
        raise PretrainedError(f"head={model.head!r} gives no sentence vectors; use head='embed'.")
    save(folder, model, params, **options)
    names = MODULES if model.is_normalized else MODULES[:2]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i)]
    package = "sentence_transformers.models"
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    flags = {f"pooling_mode_{theirs}": ours == model.pooling for ours, theirs in _POOLINGS.items()}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": model.block.width, **flags},
        "sentence_bert_config.json": {"max_seq_length": max_tokens or model.max_tokens, "do_lower_case": False},
    }
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
