"""What is written for an adapter: which modules with which pairs, what else whole; and what has no form in PEFT."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from jaxdl.finetune.adapters import COLLECTION
from jaxdl.finetune.lora import Lora
from jaxdl.paths import Tree, claim, flatten
from jaxdl.pretrained.entries import Entry
from jaxdl.pretrained.family import Family, family_of, find_family
from jaxdl.pretrained.ledger import near
from jaxdl.pretrained.peft.base import own_path, unrolled_leaves
from jaxdl.pretrained.peft.config import TASK_MODULES, task_of
from jaxdl.pretrained.peft.factors import Pair, join_pairs
from jaxdl.pretrained.peft.outline import LEAVES, Outline, base_mismatch, outline
from jaxdl.pretrained.peft.places import Place, in_memory, is_below, modules_above
from jaxdl.pretrained.registry import FAMILIES


class Module(NamedTuple):
    """A module that PEFT will adapt.

    Attributes:
      name: in memory.
      place: in the map.
      pair: of the whole module; its factor is that of the first adapter in it.
      ranks: of the adapters in it: several where it is fused.
    """

    name: str
    place: Place
    pair: Pair
    ranks: tuple[int, ...]


class Plan(NamedTuple):
    """What will be written.

    Attributes:
      outline: of the model.
      is_bare: the model is a backbone alone, whose modules have no prefix.
      modules: with an adapter.
      whole: entries of the map that are written whole.
      kept: their modules, as `modules_to_save` names them.
      task: PEFT's name of the task, or None.
    """

    outline: Outline
    is_bare: bool
    modules: list[Module]
    whole: list[Entry]
    kept: list[str]
    task: str | None

    def name(self, name: str) -> str:
        """What transformers calls a module or tensor of the map in memory."""
        return in_memory(name, self.outline.family.names, is_bare=self.is_bare)


def make_plan(
    model: nn.Module, params: Tree, settings: Lora, saved: Sequence[str], family: Family | None
) -> tuple[Plan, list[str]]:
    """Decides what is written; the arguments are those of `save_peft`.

    Returns:
      `(plan, problems)`; a plan with problems is not complete.
    """
    config = (family or family_of(model, FAMILIES)).to_config(model)
    found = outline(model, family or find_family(config, FAMILIES))  # several may share the module's class
    [architecture] = config["architectures"]
    plan = Plan(found, architecture == found.family.bare, [], [], [], task_of(architecture))
    problems = base_mismatch(params, found)
    pairs, more = _read_pairs(params.get(COLLECTION, {}), found, settings)
    problems += more
    if not problems:
        modules = [_module(plan, place, pairs, settings) for place in found.places]
        plan = plan._replace(modules=[module for module in modules if module is not None])
        problems += [problem for module in plan.modules for problem in _module_problems(module, pairs, settings)]
    if isinstance(saved, str):
        return plan, [*problems, f"saved={saved!r} is no list of regular expressions; give a list of str."]
    chosen, more = claim(saved, found.leaves, what="saved rule")
    plan = _keep_whole(plan, set(chosen))
    flat = flatten(params)
    plain = [path for path in found.leaves if own_path(path, flat) in flat]
    return plan, problems + more + list(_saved_problems(plan, chosen, plain))


def _saved_problems(plan: Plan, chosen: Collection[str], plain: Collection[str]) -> Iterator[str]:
    held = {path for entry in plan.outline.lines for path in entry.paths}
    for path in (path for path in chosen if path not in held):
        yield f"{path} has no tensor in this family's map; leave it out of saved."
    for path in (path for entry in plan.whole for path in entry.paths if path not in plain):
        yield f"{path} is to be written whole, but is quantised; give the base with that leaf as it was."
    for module in (module for module in plan.modules if is_below(module.name, reached(plan, plan.kept))):
        yield (
            f"{', '.join(module.place.paths)}: {module.name} has an adapter and is to be written whole, and PEFT does "
            "one of them; merge the adapter, or leave the leaf out of saved."
        )


def _read_pairs(adapters: Tree, found: Outline, settings: Lora) -> tuple[dict[str, Pair], list[str]]:
    """`{path of kernel or embedding: pair}`, and what is wrong with the adapters."""
    flat = {path: np.asarray(leaf) for path, leaf in unrolled_leaves(adapters)}
    modules = dict.fromkeys(path.rpartition("/")[0] for path in flat)
    names = ("a", "b", "magnitude")
    problems = [
        f"{COLLECTION}/{path} is no leaf of LoRA ({', '.join(names)}); PEFT's format for LoRA has no place for it."
        for path in flat
        if path.rpartition("/")[2] not in names
    ]
    if not flat:
        problems.append(f"params have no {COLLECTION!r}; make them with lora.add.")
    places = {path for place in found.places for path in place.paths}
    pairs = {}
    for module in modules if not problems else ():
        path = next((p for p in (f"{module}/{leaf}" for leaf in LEAVES) if p in found.leaves), f"{module}/kernel")
        pair = Pair(*(flat.get(f"{module}/{name}") for name in names))  # type: ignore[arg-type]
        more = list(_pair_problems(module, path, pair, found, settings.has_magnitude, places))
        problems += more
        if not more:
            pairs[path] = pair
    return pairs, problems


def _pair_problems(
    module: str, path: str, pair: Pair, found: Outline, has_magnitude: bool, places: set[str]
) -> Iterator[str]:
    if path not in found.leaves:
        yield f"{COLLECTION}/{module} is at no kernel or embedding of the model; nearest: {near(module, places)}."
        return
    if path not in places:
        yield f"{path} is no module of its own in transformers, so PEFT cannot adapt it; merge it, or do not adapt it."
        return
    given = {name: leaf for name, leaf in zip(Pair._fields, pair, strict=True) if leaf is not None}
    lacking = {"a", "b", *(["magnitude"] if has_magnitude else [])} - given.keys()
    if lacking or (pair.magnitude is not None and not has_magnitude):
        yield f"{COLLECTION}/{module} has {sorted(given)}, but settings has_magnitude={has_magnitude}; give its own."
        return
    *inputs, n_outputs = found.leaves[path].shape
    rank = pair.a.shape[-1]
    shapes = {"a": (*inputs, rank), "b": (rank, n_outputs), "magnitude": (n_outputs,)}
    for name in (name for name, leaf in given.items() if tuple(leaf.shape) != shapes[name]):
        yield (
            f"{COLLECTION}/{module}/{name} has shape {tuple(given[name].shape)}, but {path} "
            f"{tuple(found.leaves[path].shape)} takes {shapes[name]}; it is of another model."
        )


def _module(plan: Plan, place: Place, pairs: Mapping[str, Pair], settings: Lora) -> Module | None:
    own = [pairs.get(path) for path in place.paths]
    ranks = tuple(pair.a.shape[-1] for pair in own if pair is not None)
    if not ranks:
        return None
    scales = [1.0 if pair is None else settings.scale(pair.a.shape[-1]) for pair in own]
    return Module(plan.name(place.module), place, join_pairs(own, place.widths, scales), ranks)


def _module_problems(module: Module, pairs: Mapping[str, Pair], settings: Lora) -> Iterator[str]:
    if not settings.has_magnitude:
        return
    if module.place.kind in ("embedding", "output"):
        yield f"{module.place.paths[0]} is an embedding, and DoRA has none there; merge it, or do not adapt it."
    lacking = [path for path in module.place.paths if path not in pairs]
    if lacking:
        yield f"{', '.join(lacking)} lie in {module.name} beside adapted ones, and DoRA needs all; adapt them too."


def _keep_whole(plan: Plan, chosen: set[str]) -> Plan:
    """Puts in what is written whole: entries of the chosen leaves' modules, and of those that PEFT keeps by itself."""
    tensors = (name for entry in plan.outline.lines if chosen & {*entry.paths} for name in entry.tensors)
    owners = {plan.name(name).rpartition(".")[0] for name in tensors}
    by_task = [name for name in TASK_MODULES.get(plan.task or "", ()) if reached(plan, [name])]
    if any(is_below(module.name, reached(plan, by_task)) for module in plan.modules):
        plan, by_task = plan._replace(task=None), []  # an adapter in the head itself
    owners = {name for name in owners if not is_below(name, reached(plan, by_task))}
    kept = sorted(by_task) + sorted(name for name in owners if not is_below(name, owners - {name}))
    modules = reached(plan, kept)
    whole = [entry for entry in plan.outline.lines if any(is_below(plan.name(name), modules) for name in entry.tensors)]
    return plan._replace(whole=whole, kept=kept)


def reached(plan: Plan, kept: Sequence[str]) -> set[str]:
    """The modules that PEFT takes for `modules_to_save`: those whose name has one of these ends, dot or no dot."""
    return {name for name in all_modules(plan) if any(name.endswith(end) for end in kept)}


def all_modules(plan: Plan) -> set[str]:
    """The modules of transformers that hold a tensor of the map, and those around them, by their names in memory."""
    known = plan.outline.known
    names = [name for entry in plan.outline.lines for name in entry.tensors] + [tie.tensor for tie in known.tied]
    return modules_above(plan.name(name) for name in names)
