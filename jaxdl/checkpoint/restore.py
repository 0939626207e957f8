"""Parameters from a checkpoint of another model, checked leaf by leaf, with a ledger of what came from where."""

import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdl import paths
from jaxdl.checkpoint import arrays as disk
from jaxdl.checkpoint import folders
from jaxdl.checkpoint import manifest as manifests
from jaxdl.checkpoint.folders import Skipped
from jaxdl.checkpoint.leaves import describe, place, to_host
from jaxdl.checkpoint.manifest import CheckpointError, CheckpointMismatch, LeafRecord
from jaxdl.paths import Tree, flatten, nearest

PREFIX = "params/"


class Ledger(NamedTuple):
    """What became of every leaf; `str` gives a summary of a few lines.

    Attributes:
      source: the step folder, or "a tree".
      loaded: `{model path: checkpoint path}`.
      fresh: model paths that kept the values of `like`.
      left_over: checkpoint paths that no model leaf took.
      sizes: `{model path: number of elements}`.
      skipped: damaged steps that were passed over, with the reason.

    Example:
      >>> print(Ledger("runs/a/9", {"enc/w": "encoder/w"}, ("head/w",), (), {"enc/w": 30, "head/w": 10}, ()))
      loaded 1/2 leaves (75.0 % of parameters) from runs/a/9
        renamed 1: encoder/w -> enc/w
        fresh 1: head/w
    """

    source: str
    loaded: dict[str, str]
    fresh: tuple[str, ...]
    left_over: tuple[str, ...]
    sizes: dict[str, int]
    skipped: Skipped

    @property
    def renamed(self) -> dict[str, str]:
        """`{model path: checkpoint path}` of the loaded leaves whose path changed."""
        return {path: old for path, old in self.loaded.items() if path != old}

    def __str__(self) -> str:
        n_loaded = sum(self.sizes[path] for path in self.loaded)
        percent = 100 * n_loaded / max(sum(self.sizes.values()), 1)
        lines = [
            f"loaded {len(self.loaded)}/{len(self.sizes)} leaves ({percent:.1f} % of parameters) from {self.source}",
            _listing("renamed", [f"{old} -> {path}" for path, old in self.renamed.items()]),
            _listing("fresh", self.fresh),
            _listing("left over", self.left_over),
            _listing("damaged steps passed over", [str(step) for step, _ in self.skipped]),
        ]
        return "\n".join(filter(None, lines))


def _listing(title: str, items: Sequence[str]) -> str:
    more = f" and {len(items) - 6} more" if len(items) > 6 else ""
    return f"  {title} {len(items)}: {', '.join(items[:6])}{more}" if items else ""


def restore_params(
    source: str | os.PathLike[str] | Tree,
    like: Tree,
    *,
    rename: Sequence[tuple[str, str]] = (),
    fresh: Sequence[str] = (),
    drop: Sequence[str] = (),
    on_note: Callable[[str], object] = print,
) -> tuple[Tree, Ledger]:
    """Fills a model's parameters from a checkpoint, and refuses whatever no rule explains.

    Of the paths of the source those under `params/` are taken, and called by the rest of their path, unless the
    model's own begin with `params/`. A regex matches a whole path, the first that does wins, and every one must win.

    Args:
      source: the directory of a `Store` (its newest intact step is read), a step folder, a flat dict or a tree.
      like: the model's parameters; concrete where `fresh`, else abstract leaves do.
      rename: `(regex, replacement)` over the checkpoint's paths, as in `re.sub`: `("encoder/(.*)", r"enc/\\1")`.
      fresh: regexes over the model's paths that keep the values of `like`. A checkpoint leaf of that path is left over.
      drop: regexes over the checkpoint's paths (before `rename`) to leave out.
      on_note: is told of every damaged step that is passed over.

    Returns:
      `(params, ledger)`; params has the structure of `like`, its leaves are placed as `Store.restore` does.

    Raises:
      CheckpointMismatch: every leaf without a counterpart, of another shape or dtype, and every rule that is invalid or
        wins nothing, each with the nearest paths and the rule that would silence it.
      CheckpointCorrupt: what would be read is damaged (in all steps of the directory).
      CheckpointError: there is no checkpoint, or a leaf is not an array.

    Example:
      >>> saved = {"encoder/w": np.ones(3, np.float32), "head/w": np.ones(2, np.float32)}
      >>> like = {"enc": {"w": np.zeros(3, np.float32)}, "head": {"w": np.zeros(5, np.float32)}}
      >>> params, ledger = restore_params(saved, like, rename=[("encoder/(.*)", r"enc/\\1")], fresh=["head/.*"])
      >>> params["enc"]["w"]
      array([1., 1., 1.], dtype=float32)
      >>> print(ledger)
      loaded 1/2 leaves (37.5 % of parameters) from a tree
        renamed 1: encoder/w -> enc/w
        fresh 1: head/w
        left over 1: head/w
    """

    _check_rules(rename, fresh, drop)

    def read(folder: Path) -> _Loaded:
        manifest = manifests.read(folder)
        plan = _plan(manifest.leaves, like, rename=rename, fresh=fresh, drop=drop)
        records = {plan.prefix + old: manifest.leaves[plan.prefix + old] for old in plan.loaded.values()}
        manifests.verify(folder)  # Orbax would report damage by tracebacks from its own threads
        arrays = disk.read(folder, records)
        manifests.check_leaves(records, arrays)
        return _Loaded(str(folder), plan, arrays, records)

    skipped: Skipped = ()
    if not isinstance(source, (str, os.PathLike)):
        arrays, records = to_host(source)
        loaded = _Loaded("a tree", _plan(records, like, rename=rename, fresh=fresh, drop=drop), arrays, records)
    elif (Path(source) / manifests.FILE_NAME).is_file():
        loaded = read(Path(source).absolute())
    else:
        loaded, _, skipped = folders.walk_back(Path(source).absolute(), read, on_note=on_note)
    return _fill(like, loaded, skipped)


def _check_rules(rename: Any, fresh: Any, drop: Any) -> None:
    lists = {"rename": rename, "fresh": fresh, "drop": drop}
    problems = [f"{what}={rules!r} is one str; give a list." for what, rules in lists.items() if isinstance(rules, str)]
    for what in ("fresh", "drop"):
        problems += [f"{what} rule {rule!r} is not a str." for rule in lists[what] if not isinstance(rule, str)]
    for rule in () if isinstance(rename, str) else rename:
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and all(isinstance(part, str) for part in rule)):
            problems.append(f"rename rule {rule!r} is not a pair (regex, replacement).")
    if problems:
        raise CheckpointError.listing("rules of restore_params", problems)


class _Plan(NamedTuple):
    prefix: str
    loaded: dict[str, str]  # model path -> checkpoint path, without the prefix
    fresh: tuple[str, ...]
    left_over: tuple[str, ...]


class _Loaded(NamedTuple):
    source: str
    plan: _Plan
    arrays: dict[str, np.ndarray]
    records: dict[str, LeafRecord]


def _fill(like: Tree, loaded: _Loaded, skipped: Skipped) -> tuple[Tree, Ledger]:
    plan, flat = loaded.plan, flatten(like)
    for path, old in plan.loaded.items():
        name = plan.prefix + old
        flat[path] = place(loaded.arrays[name], loaded.records[name], flat[path])
    sizes = {path: math.prod(record.shape) for path, record in describe(like).items()}
    ledger = Ledger(loaded.source, plan.loaded, plan.fresh, plan.left_over, sizes, skipped)
    return jax.tree.unflatten(jax.tree.structure(like), list(flat.values())), ledger


def _plan(
    saved: Mapping[str, LeafRecord],
    like: Tree,
    *,
    rename: Sequence[tuple[str, str]],
    fresh: Sequence[str],
    drop: Sequence[str],
) -> _Plan:
    model = describe(like)
    has_prefix = any(path.startswith(PREFIX) for path in saved) and not any(path.startswith(PREFIX) for path in model)
    prefix = PREFIX if has_prefix else ""
    saved = {path.removeprefix(prefix): record for path, record in saved.items() if path.startswith(prefix)}
    dropped, problems = paths.claim(drop, saved, what="drop rule")
    named, more = paths.rename(rename, [path for path in saved if path not in dropped])
    kept, dead = paths.claim(fresh, model, what="fresh rule")
    problems += more + dead + _abstract(kept, flatten(like))
    loaded = {path: named[path] for path in model if path in named and path not in kept}
    problems += _unfilled(model, kept, named, saved)
    taken = set(loaded.values())
    unexplained = [old for path, old in named.items() if path not in model]
    problems += _untaken(unexplained, saved, model)
    if problems:
        raise CheckpointMismatch.listing("the checkpoint does not fill the model", problems)
    return _Plan(prefix, loaded, tuple(kept), tuple(path for path in saved if path not in taken))


def _abstract(fresh: Iterable[str], flat: Mapping[str, Any]) -> list[str]:
    abstract = [path for path in fresh if isinstance(flat[path], jax.ShapeDtypeStruct)]
    return [f"{path} is fresh, but `like` holds no values for it; give initialised parameters." for path in abstract]


def _unfilled(
    model: Mapping[str, LeafRecord], fresh: Container[str], named: Mapping[str, str], saved: Mapping[str, LeafRecord]
) -> list[str]:
    problems = []
    for path, record in model.items():
        old = named.get(path)
        if path in fresh or (old is not None and (saved[old].shape, saved[old].dtype) == (record.shape, record.dtype)):
            continue
        if old is None:
            near = ", ".join(nearest(path, named)) or "it has none"
            problems.append(
                f'{path} {record} is not in the checkpoint; nearest: {near}. Rename one, or fresh=["{path}"].'
            )
        else:
            was = f"{saved[old]} in the checkpoint" + (f" (as {old})" if old != path else "")
            problems.append(f'{path} is {was}, {record} in the model; fresh=["{path}"] keeps the model\'s values.')
    return problems


def _untaken(left: Iterable[str], saved: Mapping[str, LeafRecord], model: Iterable[str]) -> list[str]:
    problems = []
    for path in left:
        near = ", ".join(nearest(path, model)) or "it has none"
        problems.append(
            f'{path} {saved[path]} has no place in the model; nearest: {near}. Rename it, or drop=["{path}"].'
        )
    return problems
