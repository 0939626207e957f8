"""Whether a config.json says all of a model: what it leaves out must not matter."""

import dataclasses
from typing import Any

from jaxdl.models.block import Block
from jaxdl.pretrained.ledger import PretrainedError

FREE = ("layout", "remat", "dtype", "param_dtype", "attention", "init_std", "residual_init_std", "parent", "name")


def check_kept(model: Any, again: Any) -> None:
    """Refuses to write a model whose config.json would load as another network.

    Args:
      model: to be written.
      again: what `to_model` makes of its config.

    Raises:
      PretrainedError: fields that differ, all of them; those that change no network (layout, dtypes, ...) may.

    Example:
      >>> from jaxdl.models.vit import ViT, vit_block
      >>> model = ViT(vit_block(8, 2, 16, window=3), n_layers=1, image_size=8, patch_size=4)
      >>> check_kept(model, model.clone(block=vit_block(8, 2, 16)))
      Traceback (most recent call last):
      jaxdl.pretrained.ledger.PretrainedError: ViT has no form in transformers: 1 problem(s)
        - block.window=3 would be loaded as None; set it to that.
    """
    if problems := _differences(model, again, ""):
        raise PretrainedError.listing(f"{type(model).__name__} has no form in transformers", problems)


def _differences(ours: Any, theirs: Any, prefix: str) -> list[str]:
    if type(ours) is not type(theirs):
        return [f"{prefix.rstrip('.') or 'it'} is a {type(ours).__name__}; use a {type(theirs).__name__}."]
    problems = []
    for name in (field.name for field in dataclasses.fields(ours) if field.name not in FREE):
        x, y = getattr(ours, name), getattr(theirs, name)
        if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
            problems += _differences(_plain(x), _plain(y), f"{prefix}{name}.")
        elif x != y and not _is_near(x, y):
            problems.append(f"{prefix}{name}={x!r} would be loaded as {y!r}; set it to that.")
    return problems


def _plain(part: Any) -> Any:
    """A block with its defaults spelt out: as many key/value heads as heads, and their size."""
    return part.replace(n_kv_heads=part.heads[1], head_size=part.heads[2]) if isinstance(part, Block) else part


def _is_near(x: Any, y: Any) -> bool:
    return isinstance(x, float) and isinstance(y, float) and abs(x - y) <= 1e-12 * abs(x)
