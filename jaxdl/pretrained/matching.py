"""Which tensor goes to which leaf, and everything that does not fit, found before any number is read."""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdl.paths import claim
from jaxdl.pretrained.entries import Entry, Ignored, Line, Tied
from jaxdl.pretrained.ledger import near, shortened

Tensors = Mapping[str, np.ndarray]


class Names(NamedTuple):
    """How the tensors of one family may be called.

    Attributes:
      prefix: of the backbone's tensors in a model with a head (`bert.`), which a bare backbone's file lacks. Maps are
        written with it.
      renames: `(old, new)` parts of names that older files use: `("LayerNorm.gamma", "LayerNorm.weight")`.
      memory: `(name in memory, name in files)` parts, where transformers calls its modules otherwise than the tensors
        in files, as PEFT's files do; they belong in `renames` too.
    """

    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    memory: tuple[tuple[str, str], ...] = ()


NO_NAMES = Names()


class Map(NamedTuple):
    """The lines of a map, parted by kind."""

    entries: tuple[Entry, ...]
    tied: tuple[Tied, ...]
    ignored: tuple[str, ...]

    @property
    def known(self) -> set[str]:
        """Every tensor name that the map speaks of."""
        return {name for entry in self.entries for name in entry.tensors} | {tie.tensor for tie in self.tied}


def sort_lines(lines: Sequence[Line]) -> Map:
    """Parts the lines by kind; a map that contradicts itself is a mistake of the family, hence a plain ValueError."""
    entries = tuple(line for line in lines if isinstance(line, Entry))
    tied = tuple(line for line in lines if isinstance(line, Tied))
    ignored = tuple(line.pattern for line in lines if isinstance(line, Ignored))
    names = [name for entry in entries for name in entry.tensors] + [tie.tensor for tie in tied]
    paths = [path for entry in entries for path in entry.paths]
    twice = sorted(text for texts in (names, paths) for text, n in Counter(texts).items() if n > 1)
    unfilled = sorted(text for text in names + paths if "{" in text)
    loose = sorted(tie.tensor for tie in tied if tie.source not in names)
    if twice or unfilled or loose:
        raise ValueError(f"map: named twice {twice}; placeholders left in {unfilled}; tied to no entry {loose}.")
    if any(len(entry.tensors) > 1 and len(entry.paths) > 1 for entry in entries):
        raise ValueError("map: an entry has several tensors and several leaves; one of them must be single.")
    return Map(entries, tied, ignored)


class Plan(NamedTuple):
    """What an import will do.

    Attributes:
      entries: those that load a leaf.
      actual: `{name in the map: name in the file}`.
      fresh: leaf paths that are not loaded.
      dropped: names in the file that are left out.
      ignored: names in the file of declared buffers.
    """

    entries: list[Entry]
    actual: dict[str, str]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    ignored: tuple[str, ...]


def plan_import(
    lines: Map, tensors: Tensors, flat: Mapping[str, Any], *, names: Names, fresh: Sequence[str], drop: Sequence[str]
) -> tuple[Plan, list[str]]:
    dropped, problems = claim(drop, tensors, what="drop rule")
    kept, dead = claim(fresh, flat, what="fresh rule")
    ignored = [name for name in tensors if any(fnmatch.fnmatchcase(name, pattern) for pattern in lines.ignored)]
    offered = [name for name in tensors if name not in dropped and name not in ignored]
    actual, doubled = known_by(offered, lines.known, names)
    for tie in lines.tied:  # a file may hold the second name only
        if tie.source not in actual and tie.tensor in actual:
            actual[tie.source] = actual.pop(tie.tensor)
    problems += dead + doubled + _broken_ties(lines.tied, actual, tensors)
    needed = [e for e in lines.entries if any(path in flat and path not in kept for path in e.paths)]
    problems += uncovered(lines.entries, flat, kept)
    problems += shortened(_missing(needed, actual, offered, dropped), "tensors missing")
    problems += shortened(_misfits(needed, actual, tensors, flat), "tensors of a wrong shape or dtype")
    ours = {actual[name] for e in lines.entries for name in e.tensors if name in actual}
    ties = {actual[tie.tensor] for tie in lines.tied if tie.tensor in actual}
    problems += shortened(_extra([n for n in offered if n not in ours | ties], lines, names, actual, tensors), "extra")
    used = {actual[name] for e in needed for name in e.tensors if name in actual}
    left_out = tuple(name for name in tensors if name in dropped or name in ours - used)
    return Plan(needed, actual, tuple(kept), left_out, tuple(ignored)), problems


def known_by(offered: Sequence[str], known: set[str], names: Names) -> tuple[dict[str, str], list[str]]:
    """`{name in the map: name in the file}`, with the prefix and the present spelling put in."""
    actual: dict[str, str] = {}
    problems = []
    for name in offered:
        spelt = name
        for old, new in names.renames:
            spelt = spelt.replace(old, new)
        spellings = (name, names.prefix + name, spelt, names.prefix + spelt)
        found = next((spelling for spelling in spellings if spelling in known), None)
        if found in actual:
            problems.append(f"{name} and {actual[found]} are one tensor under two names; drop one of them.")
        elif found is not None:
            actual[found] = name
    return actual, problems


def _broken_ties(tied: Sequence[Tied], actual: Mapping[str, str], tensors: Tensors) -> list[str]:
    problems = []
    for tie in tied:
        a, b = actual.get(tie.tensor), actual.get(tie.source)
        if a is None or b is None:
            continue
        x, y = tensors[a], tensors[b]
        if (x.shape, x.dtype) != (y.shape, y.dtype) or x.tobytes() != y.tobytes():
            problems.append(
                f"{a} is tied to {b} in this model, but they differ in the file; say tie_word_embeddings=false in its "
                f'config.json if they are two matrices, or drop=["{a}"].'
            )
    return problems


def uncovered(entries: Sequence[Entry], flat: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    covered = {path for entry in entries for path in entry.paths}
    problems = [
        f"{path} {_spec(leaf)} has no tensor in this family's map; name it in fresh to start it anew."
        for path, leaf in flat.items()
        if path not in covered and path not in fresh
    ]
    for entry in entries:
        lacking = [path for path in entry.paths if path not in flat]
        if lacking and not (entry.is_optional and len(lacking) == len(entry.paths)):
            nearest = near(lacking[0], flat)
            problems.append(
                f"the map gives {entry.tensors[0]} to {lacking[0]}, no leaf of the model; nearest: {nearest}."
            )
    return shortened(problems, "leaves or entries that do not meet")


def _missing(
    needed: Sequence[Entry], actual: Mapping[str, str], offered: Sequence[str], dropped: Mapping[str, Any]
) -> list[str]:
    free = [name for name in offered if name not in actual.values()] or list(offered)
    lacking = [(name, entry) for entry in needed for name in entry.tensors if name not in actual]
    return [
        f"{name} is not in the file{' (a drop rule took it)' if name in dropped else ''}, and {entry.paths[0]} needs "
        f'it; nearest: {near(name, free)}. fresh=["{entry.paths[0]}"] starts the leaf anew.'
        for name, entry in lacking
    ]


def _misfits(
    needed: Sequence[Entry], actual: Mapping[str, str], tensors: Tensors, flat: Mapping[str, Any]
) -> list[str]:
    problems = []
    for entry in needed:
        if any(path not in flat for path in entry.paths):
            continue
        try:
            shape = tensor_shape(entry, flat)
        except ValueError as error:
            leaf = f"{entry.paths[0]} {_spec(flat[entry.paths[0]])}"
            problems.append(f"{entry.tensors[0]} cannot become {leaf} by {entry.transform.name}: {error}.")
            continue
        for name in (name for name in entry.tensors if name in actual):
            problems += _misfit(actual[name], tensors[actual[name]], shape, entry, flat)
    return problems


def _misfit(name: str, tensor: np.ndarray, shape: tuple[int, ...], entry: Entry, flat: Mapping[str, Any]) -> list[str]:
    leaf = flat[entry.paths[0]]
    where = f"{entry.paths[0]} {_spec(leaf)}" + (f" and {len(entry.paths) - 1} more" if entry.paths[1:] else "")
    problems = []
    if tuple(tensor.shape) != shape:
        problems.append(
            f"{name} has shape {tuple(tensor.shape)} in the file, but {where} takes {shape}; set the model's size in "
            f'config.json or by an override, or fresh=["{entry.paths[0]}"].'
        )
    floats = [jax.dtypes.issubdtype(dtype, np.floating) for dtype in (tensor.dtype, leaf.dtype)]
    if floats[0] != floats[1] or (floats[0] and tensor.dtype.itemsize < 2):
        problems.append(
            f"{name} is {tensor.dtype} in the file, but {where} takes floats of 16 bits or more; quantised weights are "
            "not read: save the model unquantised."
        )
    return problems


def _extra(left: Sequence[str], lines: Map, names: Names, actual: Mapping[str, str], tensors: Tensors) -> list[str]:
    free = [name for name in lines.known if name not in actual] or sorted(lines.known)
    return [
        f"{name} {_spec(tensors[name])} has no place in the model; nearest: {near(name, free)}. "
        f'drop=["{name}"] leaves it out.'
        for name in left
    ]


def _spec(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def tensor_shape(entry: Entry, flat: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of each tensor of an entry."""
    shapes = [entry.transform.tensor_shape(shape) for shape in part_shapes(entry, flat)]
    if len(entry.paths) == 1:
        return shapes[0]
    joined = list(shapes[0])
    joined[entry.axis] = sum(shape[entry.axis] for shape in shapes)
    return tuple(joined)


def part_shapes(entry: Entry, flat: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of the leaves, or of one tensor's equal share of the leaf."""
    shapes = [tuple(flat[path].shape) for path in entry.paths]
    n, axis = len(entry.tensors), entry.axis
    if n == 1:
        return shapes
    if shapes[0][axis] % n:
        raise ValueError(f"axis {axis} of {shapes[0]} is no multiple of {n} tensors")
    share = list(shapes[0])
    share[axis] //= n
    return [tuple(share)]
