"""Whether the tensors of a PEFT adapter fit the model and its config: a line for everything that does not."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxdl.pretrained.matching import tensor_shape
from jaxdl.pretrained.peft.config import is_target, rank_and_alpha
from jaxdl.pretrained.peft.factors import MAGNITUDE, expected_shapes, tensor_pair
from jaxdl.pretrained.peft.file import Adapted, File
from jaxdl.pretrained.peft.outline import PREFIX
from jaxdl.pretrained.peft.places import Place, is_below, modules_above


def module_problems(file: File, config: Mapping[str, Any]) -> Iterator[str]:
    """Tensors of adapted modules that are missing, too many, of another shape or no floats."""
    for module in file.modules:
        rank, _ = rank_and_alpha(config, module.name)
        leaf, where = tuple(file.outline.leaves[module.place.paths[0]].shape), ", ".join(module.place.paths)
        shapes = expected_shapes(module.place, leaf, rank, config["use_dora"])
        for end in (end for end in shapes if end not in module.tensors):
            yield f"{PREFIX}{module.name}.{end} is not in the file, and {where} needs it."
        for end, tensor in module.tensors.items():
            name, shape = f"{PREFIX}{module.name}.{end}", tuple(tensor.shape)
            if end not in shapes:
                why = f" with use_dora={config['use_dora']}" if end == MAGNITUDE else ""
                yield f"{name} is in the file, but an adapter of this {module.place.kind}{why} has {', '.join(shapes)}."
            elif shape != shapes[end]:
                takes = f"r={rank} and {where} {leaf} take {shapes[end]}"
                yield f"{name} has shape {shape}, but {takes}; load the base that it was made for."
            elif not _is_float(tensor):
                yield f"{name} is {tensor.dtype}; only floats of 16 bits or more are read."
        if config["use_dora"] and module.place.kind in ("embedding", "output"):
            yield f"{module.name} has DoRA, which jaxdl has for matrices and not for embeddings; merge it with PEFT."


def _is_float(tensor: np.ndarray) -> bool:
    return jax.dtypes.issubdtype(tensor.dtype, np.floating) and tensor.dtype.itemsize > 1


def target_problems(file: File, config: Mapping[str, Any]) -> Iterator[str]:
    """Modules that the config adapts and the file does not, and the other way round."""
    present = {module.place.module for module in file.modules}
    for place in file.outline.places:
        name = file.spelling.of(place.module)
        expected = is_target(config, name)
        if expected and place.module not in present:
            yield f"{name} is named by target_modules of the config, but the file has no tensors of it; fetch it again."
        elif expected is False and place.module in present:
            yield f"{name} has tensors in the file, but target_modules of the config does not name it; add it there."


def whole_problems(file: File, config: Mapping[str, Any]) -> Iterator[str]:
    """Tensors of `modules_to_save` that are missing, of another shape or no floats."""
    spelt, entries = file.spelling.of, {name: entry for entry in file.outline.lines for name in entry.tensors}
    ends = tuple(config.get("modules_to_save") or ())
    kept = {module for module in modules_above(map(spelt, entries)) if module.endswith(ends)}
    for name in (name for name in entries if is_below(spelt(name), kept) and name not in file.whole):
        yield f"{PREFIX}{spelt(name)} is not in the file, though modules_to_save names it; fetch it again."
    for name, tensor in file.whole.items():
        source = file.sources.get(name, name)
        first = file.whole.get(source, tensor)
        if not np.array_equal(tensor, first):
            yield f"{PREFIX}{spelt(name)} and {spelt(source)} are one leaf here, but differ in the file; untie them."
        elif source in entries:
            shape, where = tensor_shape(entries[source], file.outline.leaves), ", ".join(entries[source].paths)
            if tuple(tensor.shape) != shape or not _is_float(tensor):
                given = f"{tensor.dtype}{list(tensor.shape)}"
                yield f"{PREFIX}{spelt(name)} is {given} in the file, but {where} takes floats {list(shape)}."


def tie_problems(file: File, config: Mapping[str, Any]) -> Iterator[str]:
    """Modules that share a weight, which is one leaf here with one adapter, but have other adapters each."""
    sharing: dict[str, list[Place]] = {}
    for place in file.outline.places:
        sharing.setdefault(place.paths[0], []).append(place)
    given = {module.place.module: module for module in file.modules}
    for path, places in sharing.items():
        present = [given[place.module] for place in places if place.module in given]
        lacking = [file.spelling.of(place.module) for place in places if place.module not in given]
        factors = {rank_and_alpha(config, module.name) for module in present}
        inputs = tuple(file.outline.leaves[path].shape[:-1])
        if present and (lacking or len(factors) > 1 or not _is_same(present, inputs)):
            names = ", ".join(module.name for module in present)
            why = f"{', '.join(lacking)} has none" if lacking else "their adapters differ"
            yield (
                f"{names}: the weight {path} has one adapter here wherever it is used, but {why}; merge it with PEFT "
                "and load that, or load a base whose head is not tied."
            )


def _is_same(modules: list[Adapted], inputs: tuple[int, ...]) -> bool:
    pairs = [tensor_pair(module.place, module.tensors, inputs) for module in modules]
    return all(np.array_equal(x, y) for pair in pairs for x, y in zip(pair[:2], pairs[0][:2], strict=True))
