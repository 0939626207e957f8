"""LoRA adapters in: what PEFT wrote, as adapters of a jaxdl model."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.finetune.adapters import COLLECTION, nest
from jaxdl.finetune.lora import Lora
from jaxdl.paths import Rules, Tree, claim, flatten
from jaxdl.pretrained.entries import Entry
from jaxdl.pretrained.family import Family
from jaxdl.pretrained.ledger import Ledger, PretrainedError, shortened, sizes_of
from jaxdl.pretrained.mapping import to_params
from jaxdl.pretrained.peft.base import base_problems, is_layer, layer_of, own_path
from jaxdl.pretrained.peft.checks import module_problems, target_problems, tie_problems, whole_problems
from jaxdl.pretrained.peft.config import rank_and_alpha, read_adapter_config
from jaxdl.pretrained.peft.factors import Pair, padded, scaled, split_pair, tensor_pair
from jaxdl.pretrained.peft.file import File, read_adapter, sort_tensors
from jaxdl.pretrained.peft.outline import PREFIX, Outline, base_mismatch, outline


def load_peft(
    path: str | os.PathLike[str], model: nn.Module, params: Tree, *, family: Family | None = None
) -> tuple[Tree, Lora, Ledger]:
    """Puts an adapter that PEFT or `save_peft` wrote beside the parameters of its base.

    GPT-2's fused `c_attn` has one adapter in PEFT; here query, key and value get one each: all the same `a`, and as `b`
    their share of the outputs. Where `b` is made of blocks, as `save_peft` writes them, each gets its own block back
    instead, with the rank and the numbers that it had before.
    A module whose `alpha / r` is another than the rank gives here has the quotient multiplied into its `b`.
    `modules_to_save` replace leaves of the base.

    Args:
      path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
      model: the base, of one of jaxdl's families, in either layout.
      params: of the base, without adapters; may be quantised.
      family: as in `load`.

    Returns:
      `(params with adapters, settings, ledger)`: float32 adapters (float64 where the file has it); the settings are for
      `with_adapters`, `lora.merge` and `save_peft`.

    Raises:
      PretrainedError: settings that jaxdl's LoRA does not have; else tensors missing, unknown or of another shape than
        the model's, an adapter of another base: all problems in one message.
    """
    path = Path(path)
    config = read_adapter_config(path)
    found = outline(model, family)
    file = sort_tensors(read_adapter(path), found)
    problems = base_mismatch(params, found)
    kinds = (file.problems, module_problems(file, config), target_problems(file, config), whole_problems(file, config))
    problems += [problem for kind in kinds for problem in shortened(list(kind), "of that kind")]
    if COLLECTION in params:
        problems.append(f"params have {COLLECTION!r} already; merge them first (lora.merge), or take them out.")
    if not file.modules and not file.problems:
        problems.append("the file holds no adapter, only whole leaves; give the folder of a LoRA.")
    if not problems:
        problems = [*_quantised(file, found, params), *base_problems(path, params), *tie_problems(file, config)]
    if problems:
        raise PretrainedError.listing(f"{path} does not fit the model", problems)
    settings = Lora(
        (),
        alpha=float(config["lora_alpha"]),
        is_rank_stabilized=bool(config["use_rslora"]),
        has_magnitude=bool(config["use_dora"]),
        dropout_rate=float(config["lora_dropout"]),
    )
    pairs = _pairs(file, config, settings)
    adapters, problems = _in_layout(pairs, found)
    if problems:
        raise PretrainedError.listing(f"{path} has no form in this layout", shortened(problems, "stacks"))
    ranks = {own: leaves["a"].shape[-1] for own, leaves in adapters.items()}
    settings = dataclasses.replace(settings, rules=_rules(ranks, found.matrices))
    flat = {_beside(own, name): leaf for own, leaves in adapters.items() for name, leaf in leaves.items()}
    whole, ledger = _whole(file, found, params)
    tree = {**_with_leaves(params, whole), COLLECTION: nest({name: jnp.array(x) for name, x in flat.items()})}
    return tree, settings, _with_adapters(ledger, pairs, file, str(path))


def _beside(path: str, name: str) -> str:
    """The path of an adapter's leaf, below the collection: `head/kernel`, `a` -> `head/a`."""
    return "/".join(filter(None, (path.rpartition("/")[0], name)))


def _pairs(file: File, config: Mapping[str, Any], settings: Lora) -> dict[str, Pair]:
    """The pair of each kernel and embedding of the unrolled model."""
    pairs: dict[str, Pair] = {}
    for module in file.modules:
        leaves = [tuple(file.outline.leaves[path].shape) for path in module.place.paths]
        rank, alpha = rank_and_alpha(config, module.name)
        scale = alpha / (rank**0.5 if settings.is_rank_stabilized else rank)
        whole = tensor_pair(module.place, module.tensors, leaves[0][:-1])
        for path, leaf, pair in zip(module.place.paths, leaves, split_pair(whole, module.place.widths), strict=True):
            if pair is not None:
                pairs[path] = padded(_scaled(pair, scale / settings.scale(pair.a.shape[-1])), leaf)
    return pairs


def _scaled(pair: Pair, factor: float) -> Pair:
    magnitude = None if pair.magnitude is None else _wide(pair.magnitude)
    return Pair(_wide(pair.a), scaled(_wide(pair.b), factor), magnitude)


def _wide(x: np.ndarray) -> np.ndarray:
    """In float32 at least."""
    return np.asarray(x, np.promote_types(x.dtype, np.float32))


def _in_layout(pairs: Mapping[str, Pair], found: Outline) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """The leaves of each kernel and embedding in the model's own layout; stacked where its layers are."""
    layers: dict[str, list[Pair]] = {}
    for path in sorted(pairs, key=layer_of):
        layers.setdefault(own_path(path, found.own), []).append(pairs[path])
    n_layers = Counter(own_path(path, found.own) for path in found.leaves)
    adapters, problems = {}, []
    for own, stack in sorted(layers.items()):
        ranks = [pair.a.shape[-1] for pair in stack]
        if len(stack) < n_layers[own] or len(set(ranks)) > 1:
            problems.append(
                f"{own} is a stack of {n_layers[own]} layers, which is adapted as one, but {len(stack)} of them have "
                f"an adapter, with ranks {ranks}; load the model with layout='unrolled'."
            )
            continue
        parts = {name: [getattr(pair, name) for pair in stack] for name in Pair._fields}
        join = np.stack if own not in found.leaves else (lambda column: column[0])
        adapters[own] = {name: join(column) for name, column in parts.items() if column[0] is not None}
    return adapters, problems


def _rules(ranks: Mapping[str, int], matrices: Sequence[str]) -> Rules:
    """Rules that give these matrices their ranks, and all others none; one for all layers where they agree."""
    rules: dict[str, int | None] = {}
    for path, rank in ranks.items():
        wide = "/".join(r"layer_\d+" if is_layer(part) else part for part in path.split("/"))
        hits, _ = claim([wide], matrices)
        rules[wide if all(ranks.get(hit) == rank for hit in hits) else path] = rank
    if len(ranks) < len(matrices):
        rules[".*"] = None
    return tuple(rules.items())


def _entries(file: File, found: Outline) -> list[Entry]:
    """The lines of the map that fill the leaves which the file replaces."""
    names = {file.sources.get(name, name) for name in file.whole}
    return [entry for entry in found.lines if names & {*entry.tensors}]


def _quantised(file: File, found: Outline, params: Tree) -> Iterator[str]:
    flat = flatten(params)
    for path in (path for entry in _entries(file, found) for path in entry.paths if own_path(path, flat) not in flat):
        yield f"{path} is replaced by the file, but is quantised in params; quantise after loading."


def _whole(file: File, found: Outline, params: Tree) -> tuple[dict[str, np.ndarray], Ledger]:
    """The leaves that the file replaces, by the paths of the unrolled model."""
    tensors, entries = {file.sources.get(name, name): x for name, x in file.whole.items()}, _entries(file, found)
    flat = flatten(params)
    like = {
        path: jax.ShapeDtypeStruct(found.leaves[path].shape, flat[own_path(path, flat)].dtype)
        for entry in entries
        for path in entry.paths
    }
    leaves, ledger = to_params(entries, tensors, nest(like), source="PEFT")
    return flatten(leaves), ledger


def _with_leaves(params: Tree, leaves: Mapping[str, np.ndarray]) -> Tree:
    flat = flatten(params)
    for path, leaf in leaves.items():
        own = own_path(path, flat)
        if own == path:
            flat[path] = jnp.array(leaf)
        else:
            flat[own] = jnp.asarray(flat[own]).at[layer_of(path)].set(leaf)
    return jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))


def _with_adapters(ledger: Ledger, pairs: Mapping[str, Pair], file: File, source: str) -> Ledger:
    names: dict[str, list[str]] = {}
    for module in file.modules:
        for path in module.place.paths:
            names.setdefault(path, []).append(f"{PREFIX}{module.name}.lora")
    shapes = {
        f"{COLLECTION}/{_beside(path, name)}": (path, leaf.shape)
        for path, pair in pairs.items()
        for name, leaf in zip(Pair._fields, pair, strict=True)
        if leaf is not None
    }
    loaded = {name: " + ".join(names[path]) for name, (path, _) in shapes.items()} | ledger.loaded
    sizes = sizes_of({name: shape for name, (_, shape) in shapes.items()}) | ledger.sizes
    return ledger._replace(source=source, loaded=loaded, sizes=sizes)
