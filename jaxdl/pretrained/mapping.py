"""The two-way map between the tensors of a Hugging Face checkpoint and the parameters of a jaxdl model.

A map is a list of lines (`jaxdl.pretrained.entries`) that is written once; import and export both follow from it.
Every tensor is used exactly once and every leaf gets exactly one source, or nothing is loaded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdl.paths import Tree, flatten
from jaxdl.pretrained.entries import Entry, Line
from jaxdl.pretrained.ledger import Ledger, PretrainedError, sizes_of
from jaxdl.pretrained.matching import NO_NAMES, Names, Tensors, part_shapes, plan_import, sort_lines, uncovered


def to_params(
    lines: Sequence[Line],
    tensors: Tensors,
    like: Tree,
    *,
    names: Names = NO_NAMES,
    fresh: Sequence[str] = (),
    drop: Sequence[str] = (),
    source: str = "tensors",
) -> tuple[Tree, Ledger]:
    """Brings tensors in: checks names, shapes and dtypes of all of them first, then converts.

    Args:
      lines: the family's map for this model.
      tensors: `{name: array}`; memory-mapped arrays are read one at a time.
      like: parameters of the unrolled model; abstract leaves do. Their dtype is that of the result.
      names: the backbone's prefix, and older names.
      fresh: regexes over leaf paths that are not loaded; such a leaf comes back as it stands in `like`. Tensors that
        only fresh leaves need are dropped.
      drop: regexes over the names in the file that are left out.
      source: for messages and the ledger.

    Returns:
      `(params, ledger)`: the structure of `like` with NumPy leaves.

    Raises:
      PretrainedError: tensors missing, too many, of a wrong shape or dtype, ties that differ, rules that win nothing:
        all in one message.

    Example:
      >>> from jaxdl.pretrained.entries import dense
      >>> like = {"head": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
      >>> params, ledger = to_params(dense("fc", "head"), {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)}, like)
      >>> params["head"]["kernel"].shape, ledger.loaded
      ((3, 2), {'head/kernel': 'fc.weight', 'head/bias': 'fc.bias'})
    """
    flat = flatten(like)
    plan, problems = plan_import(sort_lines(lines), tensors, flat, names=names, fresh=fresh, drop=drop)
    if problems:
        raise PretrainedError.listing(f"{source} does not fill the model", problems)
    leaves: dict[str, Any] = dict(flat)
    for entry in plan.entries:
        parts = [tensors[plan.actual[name]] for name in entry.tensors]
        leaves.update({p: x for p, x in _leaves(entry, parts, flat).items() if p not in plan.fresh})
    loaded = {p: " + ".join(plan.actual[n] for n in e.tensors) for e in plan.entries for p in e.paths}
    loaded = {path: name for path, name in loaded.items() if path not in plan.fresh}
    sizes = sizes_of({path: tuple(leaf.shape) for path, leaf in flat.items()})
    ledger = Ledger(source, loaded, plan.fresh, plan.dropped, plan.ignored, sizes)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in flat]), ledger


def _leaves(entry: Entry, tensors: Sequence[np.ndarray], flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    shapes = part_shapes(entry, flat)
    if len(tensors) > 1:
        leaf = np.concatenate([entry.transform.to_leaf(tensor, shapes[0]) for tensor in tensors], entry.axis)
        parts = [leaf]
    else:
        widths = [entry.transform.tensor_shape(shape)[entry.axis] for shape in shapes] if entry.paths[1:] else []
        pieces = np.split(tensors[0], np.cumsum(widths)[:-1], entry.axis) if widths else tensors
        parts = [entry.transform.to_leaf(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return {p: np.array(part, flat[p].dtype, order="C") for p, part in zip(entry.paths, parts, strict=True)}


def to_tensors(
    lines: Sequence[Line], params: Tree, *, names: Names = NO_NAMES, bare: bool = False
) -> dict[str, np.ndarray]:
    """Brings parameters out: the inverse of `to_params`, byte for byte.

    Args:
      lines: the family's map for this model.
      params: of the unrolled model; every leaf must be in the map.
      names: the backbone's prefix.
      bare: the model is a backbone without a head, whose tensors have no prefix.

    Returns:
      `{name: array}` in the leaves' dtypes; tied names only where the map writes them.

    Raises:
      PretrainedError: leaves that the map does not know (adapters to be merged first, a head of another family).

    Example:
      >>> from jaxdl.pretrained.entries import dense
      >>> params = {"head": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}}
      >>> {name: x.shape for name, x in to_tensors(dense("fc", "head"), params).items()}
      {'fc.weight': (2, 3), 'fc.bias': (2,)}
    """
    known, flat = sort_lines(lines), flatten(params)
    problems = uncovered(known.entries, flat, {})
    if problems:
        raise PretrainedError.listing("the parameters have no place in the file", problems)
    tensors: dict[str, np.ndarray] = {}
    for entry in (entry for entry in known.entries if entry.paths[0] in flat):
        tensors.update(_entry_tensors(entry, [np.asarray(flat[path]) for path in entry.paths]))
    tensors.update({tie.tensor: tensors[tie.source] for tie in known.tied if tie.is_written})
    return {name.removeprefix(names.prefix) if bare else name: x for name, x in tensors.items()}


def _entry_tensors(entry: Entry, leaves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    if len(entry.tensors) > 1:
        pieces = np.split(leaves[0], len(entry.tensors), entry.axis)
        parts = [entry.transform.to_tensor(piece) for piece in pieces]
    else:
        parts = [entry.transform.to_tensor(leaf) for leaf in leaves]
        parts = parts if len(parts) == 1 else [np.concatenate(parts, entry.axis)]
    return {name: np.asarray(part, order="C") for name, part in zip(entry.tensors, parts, strict=True)}
