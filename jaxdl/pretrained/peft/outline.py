"""What both directions need to know of a model: its leaves, the map of its family, and the modules that PEFT adapts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from jaxdl.finetune.adapters import nest
from jaxdl.finetune.sites import survey
from jaxdl.paths import Tree, flatten
from jaxdl.pretrained.entries import Entry
from jaxdl.pretrained.family import Family, family_of
from jaxdl.pretrained.folder import unrolled
from jaxdl.pretrained.ledger import near, shortened
from jaxdl.pretrained.matching import Map, sort_lines
from jaxdl.pretrained.peft.base import own_path
from jaxdl.pretrained.peft.places import Place, find_places
from jaxdl.pretrained.registry import FAMILIES

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LEAVES = ("kernel", "embedding")


class Outline(NamedTuple):
    """A model as this package sees it.

    Attributes:
      family: of the model.
      known: the family's map, by kinds of lines.
      leaves: `{path: shape and dtype}` of the unrolled model.
      places: modules of transformers that can hold an adapter, and whose leaves can here.
      own: the same in the model's own layout.
    """

    family: Family
    known: Map
    leaves: Mapping[str, Any]
    places: list[Place]
    own: Mapping[str, Any]

    @property
    def matrices(self) -> list[str]:
        """Paths of kernels and embeddings in the model's own layout, which `Lora.rules` speak of."""
        return [path for path in self.own if path.rpartition("/")[2] in LEAVES]

    @property
    def lines(self) -> list[Entry]:
        """The entries of the map whose leaves the model has."""
        return [entry for entry in self.known.entries if entry.paths[0] in self.leaves]


def outline(model: nn.Module, family: Family | None) -> Outline:
    """Finds the family of a model, and looks at the model without computing anything."""
    family = family or family_of(model, FAMILIES)
    inputs, _ = family.inputs(np.random.default_rng(0), model)
    sites, own = survey(model, **inputs)
    leaves, lines = flatten(unrolled(nest(own))), family.entries(model)
    adaptable = {f"{site.path}/{site.leaf}" for site in sites.values() if site.leaf and not site.problem}
    places = find_places(lines, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    places = [place for place in places if {own_path(path, adaptable) for path in place.paths} <= adaptable]
    return Outline(family, sort_lines(lines), leaves, places, own)


def base_mismatch(params: Tree, found: Outline) -> list[str]:
    """Leaves of the model that parameters lack or have of another shape; quantised ones are as good as any.

    Args:
      params: with or without adapters.
      found: the model.
    """
    ours = flatten(params)
    problems = [
        f"the parameters lack {path} of the model; nearest: {near(path, ours)}."
        for path in found.own
        if path not in ours and not any(name.startswith(f"{path}/") for name in ours)
    ]
    problems += [
        f"{path} has shape {tuple(ours[path].shape)} in the parameters, but the model says {tuple(leaf.shape)}."
        for path, leaf in found.own.items()
        if path in ours and ours[path].shape != leaf.shape
    ]
    return shortened(problems, "leaves of the base")
