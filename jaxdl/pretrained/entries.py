"""The lines of a family's map, from which both directions follow.

A template is a tensor name or a leaf path with placeholders, such as `encoder.layer.{i}.output.dense`; `expand` fills
them. Maps are written for the unrolled layout (`layer_{i}`), also for models that scan their layers.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxdl.pretrained.transforms import Transform, identity, pad_rows, transpose


class Entry(NamedTuple):
    """Tensors and the leaves that hold the same numbers; made by `entry`, `fused` and `joined`.

    Attributes:
      tensors: names in the file: one, or several for one leaf.
      paths: of the leaves: one, or several for one tensor.
      transform: of each part.
      axis: along which the parts lie, in the tensor where it is one for several leaves, else in the leaf.
      is_optional: the model may lack the leaf; the tensor is then left out of it, and the ledger says so.
    """

    tensors: tuple[str, ...]
    paths: tuple[str, ...]
    transform: Transform = identity
    axis: int = 0
    is_optional: bool = False


class Tied(NamedTuple):
    """A second name of a tensor: absent from a file, or equal to the first bit for bit.

    Attributes:
      tensor: the second name, such as `lm_head.weight`.
      source: the first, which an `Entry` holds. A file that has the second only is read from that.
      is_written: export writes the second name too (transformers itself omits it).
    """

    tensor: str
    source: str
    is_written: bool = False


class Ignored(NamedTuple):
    """Buffers that a file may hold and no model needs: `*` stands for any characters, as in `*.position_ids`."""

    pattern: str


Line = Entry | Tied | Ignored


def entry(tensor: str, path: str, transform: Transform = identity, *, optional: bool = False) -> Entry:
    """One tensor, one leaf.

    Args:
      tensor: the name in the file, prefix included: `bert.pooler.dense.weight`.
      path: of the leaf: `pooler/kernel`.
      transform: from the tensor to the leaf.
      optional: the model may lack the leaf (BERT without a pooler); the tensor is then passed over.

    Example:
      >>> entry("bert.pooler.dense.weight", "pooler/kernel", transpose).paths
      ('pooler/kernel',)
    """
    return Entry((tensor,), (path,), transform, is_optional=optional)


def fused(tensor: str, paths: Sequence[str], transform: Transform = identity, *, axis: int) -> Entry:
    """One tensor that holds several leaves side by side, each of its own size.

    Args:
      tensor: the name in the file, such as GPT-2's `h.{i}.attn.c_attn.weight` (D, 3D).
      paths: of the leaves, in order.
      transform: from each leaf's part of the tensor to the leaf.
      axis: of the tensor along which the parts lie.

    Example:
      >>> fused("h.0.attn.c_attn.bias", [f"attention/{name}/bias" for name in ("query", "key", "value")], axis=0).axis
      0
    """
    return Entry((tensor,), tuple(paths), transform, axis)


def joined(tensors: Sequence[str], path: str, transform: Transform = identity, *, axis: int) -> Entry:
    """Several tensors of one shape that lie side by side in one leaf.

    Args:
      tensors: the names in the file, in order.
      path: of the leaf.
      transform: from each tensor to its part of the leaf.
      axis: of the leaf along which the parts lie.

    Example:
      >>> joined(["gate.weight", "up.weight"], "mlp/gate_up/kernel", transpose, axis=1).tensors
      ('gate.weight', 'up.weight')
    """
    return Entry(tuple(tensors), (path,), transform, axis)


def dense(tensor: str, path: str, *, bias: bool = True, optional: bool = False) -> list[Entry]:
    """A Linear layer: `.weight` (outputs, inputs) to `/kernel`, and `.bias`.

    Example:
      >>> [line.tensors[0] for line in dense("pooler.dense", "pooler")]
      ['pooler.dense.weight', 'pooler.dense.bias']
    """
    lines = [entry(f"{tensor}.weight", f"{path}/kernel", transpose, optional=optional)]
    return lines + ([entry(f"{tensor}.bias", f"{path}/bias", optional=optional)] if bias else [])


def norm(tensor: str, path: str, *, bias: bool = True) -> list[Entry]:
    """A LayerNorm, or with `bias=False` an RMSNorm: `.weight` to `/scale`, and `.bias`.

    Example:
      >>> [line.paths[0] for line in norm("ln_f", "decoder/final_norm")]
      ['decoder/final_norm/scale', 'decoder/final_norm/bias']
    """
    lines = [entry(f"{tensor}.weight", f"{path}/scale")]
    return lines + ([entry(f"{tensor}.bias", f"{path}/bias")] if bias else [])


def embedding(tensor: str, path: str, *, n_rows: int | None = None) -> list[Entry]:
    """An embedding table: `.weight` to `/embedding`.

    Args:
      tensor: the name without `.weight`.
      path: the path without `/embedding`.
      n_rows: real rows where the leaf may be padded with more (a vocabulary).

    Example:
      >>> embedding("wte", "embed/token", n_rows=50257)[0].transform.name
      'pad_rows(50257)'
    """
    return [entry(f"{tensor}.weight", f"{path}/embedding", identity if n_rows is None else pad_rows(n_rows))]


def expand(lines: Iterable[Line], **values: Iterable[Any]) -> list[Line]:
    """Fills placeholders with each of their values, in every combination.

    Args:
      lines: with all the placeholders.
      **values: of each placeholder: `i=range(12)`, `stack=("encoder", "decoder")`.

    Raises:
      ValueError: a line lacks a placeholder, and would be repeated as it is.

    Example:
      >>> [line.paths[0] for line in expand([entry("h.{i}.w", "decoder/layer_{i}/w")], i=range(2))]
      ['decoder/layer_0/w', 'decoder/layer_1/w']
    """
    lines = list(lines)
    lacking = [line for line in lines for name in values if any(f"{{{name}}}" not in text for text in _texts(line))]
    if lacking:
        raise ValueError(f"these lines lack one of the placeholders {sorted(values)}: {lacking}.")
    combinations = itertools.product(*values.values())
    return [_fill(line, dict(zip(values, chosen, strict=True))) for chosen in combinations for line in lines]


def _texts(line: Line) -> tuple[str, ...]:
    if isinstance(line, Entry):
        return line.tensors + line.paths
    return tuple(line[:2]) if isinstance(line, Tied) else tuple(line)


def _fill(line: Line, values: dict[str, Any]) -> Line:
    def fill(text: str) -> str:
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", str(value))
        return text

    if isinstance(line, Entry):
        return line._replace(tensors=tuple(map(fill, line.tensors)), paths=tuple(map(fill, line.paths)))
    if isinstance(line, Tied):
        return line._replace(tensor=fill(line.tensor), source=fill(line.source))
    return Ignored(fill(line.pattern))
