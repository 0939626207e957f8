"""adapter_model.safetensors of PEFT: what each tensor is, and whether it fits the model and its config."""

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdl.pretrained.ledger import PretrainedError, near
from jaxdl.pretrained.matching import known_by
from jaxdl.pretrained.peft.factors import MAGNITUDE
from jaxdl.pretrained.peft.outline import FILE, PREFIX, Outline
from jaxdl.pretrained.peft.places import WEIGHT, Place, in_memory
from jaxdl.pretrained.tensors import PICKLES, read_file

ENDS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", MAGNITUDE)
Tensors = Mapping[str, np.ndarray]


class Adapted(NamedTuple):
    """An adapted module of the file.

    Attributes:
      name: as the file spells it, without `base_model.model.`.
      place: in the model.
      tensors: by the end of their name.
    """

    name: str
    place: Place
    tensors: dict[str, np.ndarray]


class File(NamedTuple):
    """A file sorted by what its tensors are.

    Attributes:
      modules: those with an adapter.
      whole: tensors that replace those of the base, by their name in the map.
      spelling: the file's name of a module or tensor of the map.
      problems: tensors that are nothing of this model.
    """

    modules: list[Adapted]
    whole: dict[str, np.ndarray]
    spelling: "Spelling"
    problems: list[str]

    @property
    def outline(self) -> Outline:
        """Of the model."""
        return self.spelling.outline

    @property
    def sources(self) -> dict[str, str]:
        """`{second name: first}` of tied tensors."""
        return {tie.tensor: tie.source for tie in self.outline.known.tied}


class Spelling(NamedTuple):
    """How a file calls modules: with the backbone's prefix or not, as transformers has them in memory or in files."""

    outline: Outline
    is_bare: bool
    is_memory: bool

    def of(self, name: str) -> str:
        """The file's name of a module or tensor of the map."""
        names = self.outline.family.names
        return in_memory(name, names if self.is_memory else names._replace(memory=()), is_bare=self.is_bare)


def read_adapter(folder: Path) -> dict[str, np.ndarray]:
    """Opens the tensors of an adapter.

    Raises:
      PretrainedError: there are none, or a pickle only, or the file is damaged.
    """
    if (folder / FILE).exists():
        return read_file(folder / FILE)
    pickles = sorted(name.name for name in folder.iterdir() if any(fnmatch.fnmatch(name.name, p) for p in PICKLES))
    if pickles:
        raise PretrainedError(
            f"{folder} holds its weights as a pickle only ({', '.join(pickles[:3])}); reading a pickle can run any "
            "code, so jaxdl does not. On a machine where you trust the file, convert it with PEFT: "
            "PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW, safe_serialization=True)."
        )
    others = sorted(name.name for name in folder.glob("*.safetensors"))
    found = f"; it has {', '.join(others[:4])}, so rename the one you mean" if others else ""
    raise PretrainedError(f"{folder} has no {FILE}{found}.")


def sort_tensors(tensors: Tensors, outline: Outline) -> File:
    """Finds the module or the leaf of every tensor.

    Args:
      tensors: by their names in the file.
      outline: of the model.
    """
    strange = [name for name in tensors if not name.startswith(PREFIX)]
    problems = [f"{name} does not begin with {PREFIX!r}, as PEFT's tensors do." for name in strange]
    parts: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    for name, tensor in ((n.removeprefix(PREFIX), x) for n, x in tensors.items() if n not in strange):
        module, lora, end = name.partition(".lora_")
        end = f"lora_{end}".replace(f"{MAGNITUDE}{WEIGHT}", MAGNITUDE)
        if not lora:
            others[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
        elif end in ENDS:
            parts.setdefault(module, {})[end] = tensor
        else:
            problems.append(f"{PREFIX}{name} is no part of LoRA that is known here: {', '.join(ENDS)}.")
    modules, more = _find_modules(parts, outline)
    whole, missed = _find_whole(others, outline)
    return File(modules, whole, _spelling(modules, outline), problems + more + missed)


def _find_modules(parts: Mapping[str, dict[str, np.ndarray]], outline: Outline) -> tuple[list[Adapted], list[str]]:
    places = {place.module + WEIGHT: place for place in outline.places}
    actual, problems = known_by([module + WEIGHT for module in parts], set(places), outline.family.names)
    spelt = {known: name.removesuffix(WEIGHT) for known, name in actual.items()}
    modules = [Adapted(name, places[known], parts[name]) for known, name in spelt.items()]
    free = [place.module for known, place in places.items() if known not in spelt] or [p.module for p in outline.places]
    problems += [
        f"{PREFIX}{module} has an adapter, but the model has no such place for one; nearest: {near(module, free)}."
        for module in parts
        if module not in spelt.values()
    ]
    return modules, problems


def _find_whole(others: Tensors, outline: Outline) -> tuple[dict[str, np.ndarray], list[str]]:
    known = {name for entry in outline.lines for name in entry.tensors}
    known |= {tie.tensor for tie in outline.known.tied}
    actual, problems = known_by(list(others), known, outline.family.names)
    lost = [name for name in others if name not in actual.values()]
    problems += [f"{PREFIX}{name} has no place in the model; nearest: {near(name, known)}." for name in lost]
    return {ours: others[name] for ours, name in actual.items()}, problems


def _spelling(modules: list[Adapted], outline: Outline) -> Spelling:
    options = [Spelling(outline, is_bare, is_memory) for is_bare in (False, True) for is_memory in (True, False)]
    return max(options, key=lambda option: sum(option.of(module.place.module) == module.name for module in modules))
