"""Sharding rules for whole states; each preset is a list and nothing more: print it, change it."""

from typing import Any

from jaxdl.parallel.sharding import FLOOR_BYTES, Fsdp, Split
from jaxdl.paths import REST, Rules, Tree, claim, flatten

REPLICATED: Rules = ((REST, None),)
"""Data parallelism: the whole state on every device."""


def zero(stage: int, axis: str = "data", *, floor_bytes: int = FLOOR_BYTES) -> Rules:
    """ZeRO (Rajbhandari et al. 2020): what is spread over the devices that share the rows of a batch.

    Args:
      stage: 1 or 2 spread the optimizer's state, and with it what XLA sums of a gradient on each device; 3 spreads the
        parameters too (FSDP).
      axis: of the mesh.
      floor_bytes: see `Fsdp`.

    Raises:
      ValueError: another stage.

    Example:
      >>> zero(1)[0]
      ('opt_state/.*', Fsdp(axis='data', floor_bytes=65536, beside=None))
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"stage={stage} must be 1, 2 or 3.")
    value = Fsdp(axis, floor_bytes)
    return ((REST, value),) if stage == 3 else (("opt_state/.*", value), (REST, None))


# What a Transformer block of `jaxdl.models` splits (Shoeybi et al. 2019, "Megatron-LM"): heads and hidden units.
_COLUMNS = (
    r".*/(attention|cross_attention|self_attention)/(query|key|value)/(kernel|bias)",
    r".*/mlp/(up|gate)/(kernel|bias)",
)
_ROWS = r".*/(attention|cross_attention|self_attention)/output/kernel", r".*/mlp/down/kernel"
_TABLE = (r".*embed/token/embedding",)


def tensor_parallel(abstract_state: Tree, axis: str = "model") -> Rules:
    """Tensor parallelism of the Transformers of `jaxdl.models`: BERT, GPT-2, Llama-like, T5, ViT, CLIP.

    Query, key, value and the first product of a feed-forward layer are cut by columns, what follows by rows, and the
    token embedding by vocabulary. Networks without such blocks get `column_parallel`.

    Args:
      abstract_state: a state or its shapes; only rules that fit it are in the list.
      axis: of the mesh.
    """
    rules = [(regex, Split(axis, -1)) for regex in _COLUMNS] + [(regex, Split(axis, -2)) for regex in (*_ROWS, *_TABLE)]
    found = _that_match(rules, abstract_state)
    return [*found, (REST, None)] if found else column_parallel(abstract_state, axis)


def column_parallel(abstract_state: Tree, axis: str = "model") -> Rules:
    """Every kernel with at least two dimensions is cut by its outputs: any MLP, CNN or recurrent network.

    Args:
      abstract_state, axis: as for `tensor_parallel`.
    """
    return [*_that_match([(r".*/kernel", Split(axis, -1))], abstract_state), (REST, None)]


def with_fsdp(rules: Rules, axis: str = "data", *, floor_bytes: int = FLOOR_BYTES) -> Rules:
    """The same rules, and what is left of each array spread over `axis`.

    Args:
      rules: values are None or `Split`.
      axis, floor_bytes: see `Fsdp`.

    Example:
      >>> with_fsdp([("kernel", Split("model"))], "data")
      [('kernel', Fsdp(axis='data', floor_bytes=65536, beside=Split(axis='model', dimension=-1)))]
    """
    return [(regex, Fsdp(axis, floor_bytes, beside=value)) for regex, value in rules]


def _that_match(rules: list[tuple[str, Any]], tree: Tree) -> list[tuple[str, Any]]:
    names = list(flatten(tree))
    return [rule for rule in rules if claim([rule[0]], names)[0]]
