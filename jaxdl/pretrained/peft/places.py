"""The modules of transformers that can hold a LoRA pair: found in a family's map, never listed anew."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdl.pretrained.entries import Entry, Line
from jaxdl.pretrained.matching import Names, sort_lines
from jaxdl.pretrained.transforms import Transform, identity

WEIGHT = ".weight"


class Place(NamedTuple):
    """A module of transformers with a weight that PEFT adapts, and the leaves that hold that weight.

    Attributes:
      module: its name in the family's map, such as `bert.encoder.layer.0.attention.self.query`.
      kind: "linear" (GPT-2's Conv1D too), "conv", "embedding", or "output": a Linear layer whose weight is a tied
        embedding.
      paths: of the kernels, several where the module is fused out of them, or of the embedding.
      widths: how many outputs of the module each path makes; of an embedding or an "output", its rows. No padding.
      transform: from the weight, or a part of it, to a leaf.
    """

    module: str
    kind: str
    paths: tuple[str, ...]
    widths: tuple[int, ...]
    transform: Transform

    @property
    def is_input_first(self) -> bool:
        """Whether the weight is (inputs, outputs), which PEFT calls `fan_in_fan_out`: GPT-2's Conv1D."""
        return self.kind == "linear" and self.transform is identity


def find_places(lines: Sequence[Line], shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """All places of a model.

    A second name of an embedding is a module of its own for PEFT: another table (T5's `encoder.embed_tokens`, beside
    which `shared` is never called), or an output (`lm_head`).

    Args:
      lines: the family's map for the model.
      shapes: `{leaf path: shape}` of the unrolled model.

    Example:
      >>> from jaxdl.pretrained.entries import Tied, dense, embedding
      >>> lines = [*embedding("wte", "token"), Tied("lm_head.weight", "wte.weight"), *dense("fc", "mlp/up", bias=False)]
      >>> [place[:4] for place in find_places(lines, {"token/embedding": (5, 2), "mlp/up/kernel": (2, 3)})]
      [('wte', 'embedding', ('token/embedding',), (5,)), ('lm_head', 'output', ('token/embedding',), (5,)), \
('fc', 'linear', ('mlp/up/kernel',), (3,))]
    """
    known = sort_lines(lines)
    places = []
    for place in filter(None, (_place(entry, shapes) for entry in known.entries)):
        ties = [tie.tensor.removesuffix(WEIGHT) for tie in known.tied if tie.source == place.module + WEIGHT]
        tables = [name for name in ties if "embed" in name.rpartition(".")[2]]
        places += [place._replace(module=name) for name in tables or [place.module]]
        kind = "output" if place.kind == "embedding" else place.kind
        places += [place._replace(module=name, kind=kind) for name in ties if name not in tables]
    return places


def _place(entry: Entry, shapes: Mapping[str, Any]) -> Place | None:
    names = {path.rpartition("/")[2] for path in entry.paths}
    is_weight = len(entry.tensors) == 1 and entry.tensors[0].endswith(WEIGHT)
    if not is_weight or names not in ({"kernel"}, {"embedding"}) or any(path not in shapes for path in entry.paths):
        return None
    parts = [entry.transform.tensor_shape(shapes[path]) for path in entry.paths]
    n_axes, is_table = len(parts[0]), names == {"embedding"}
    outputs = 1 if entry.transform is identity and not is_table else 0  # the axis of the weight
    if n_axes < 2 or (is_table and n_axes > 2) or (entry.paths[1:] and entry.axis != outputs):
        return None
    kind = "embedding" if is_table else "linear" if n_axes == 2 else "conv"
    widths = tuple(part[outputs] for part in parts)
    return Place(entry.tensors[0].removesuffix(WEIGHT), kind, entry.paths, widths, entry.transform)


def in_memory(name: str, names: Names, *, is_bare: bool) -> str:
    """What transformers calls a module or tensor of the map, in the model that it has in memory.

    Args:
      name: in the map.
      names: of the family.
      is_bare: the model is a backbone alone, which has no prefix.

    Example:
      >>> names = Names("vit.", memory=(("layers.", "encoder.layer."), (".mlp.fc1.", ".intermediate.dense.")))
      >>> in_memory("vit.encoder.layer.0.intermediate.dense", names, is_bare=True)
      'layers.0.mlp.fc1'
    """
    dotted = f"{name}."
    for new, old in names.memory:
        dotted = dotted.replace(old, new)
    return dotted[:-1].removeprefix(names.prefix) if is_bare else dotted[:-1]


def modules_above(tensors: Iterable[str]) -> set[str]:
    """The modules that hold these tensors, and the modules that hold those.

    Example:
      >>> sorted(modules_above(["bert.pooler.dense.weight"]))
      ['bert', 'bert.pooler', 'bert.pooler.dense']
    """
    found = set()
    for tensor in tensors:
        parts = tensor.split(".")
        found |= {".".join(parts[:n]) for n in range(1, len(parts))}
    return found


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or tensor is one of the modules or lies within one.

    Example:
      >>> is_below("classifier.dense", ["classifier"]), is_below("classifiers", ["classifier"])
      (True, False)
    """
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def endings(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest ends of names that tell the chosen from the others, as PEFT's lists of modules take them.

    Args:
      chosen: names of modules.
      others: which no end may fit.

    Example:
      >>> endings(["h.0.attn.c_proj", "h.1.attn.c_proj", "h.0.c_fc"], ["h.0.mlp.c_proj"])
      ['attn.c_proj', 'c_fc']
    """
    others = [f".{name}" for name in others]
    found = set()
    for name in chosen:
        parts = name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found.add(next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name))
    return sorted(found)
