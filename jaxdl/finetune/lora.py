"""Low-rank adapters: adding them, merging them into the base, and several at once.

`add` is that of all adapters; `Lora` says which matrices get which rank, see `jaxdl.finetune.low_rank`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl import paths
from jaxdl.finetune.adapters import COLLECTION, AdapterError, add
from jaxdl.finetune.low_rank import Lora, length_of, product, wide
from jaxdl.finetune.sites import LEAVES, join, nest
from jaxdl.paths import Tree

__all__ = ["Lora", "add", "combine", "merge"]

Leaves = dict[str, Array]


def merge(params: Tree, settings: Lora) -> Tree:
    """The base with the adapters added in, for a model that knows nothing of them: `W + scale * a b`, or DoRA's.

    Args:
      params: of `add`, perhaps trained.
      settings: of the adapters.

    Returns:
      The parameters without `adapters`; kernels keep their dtype, sums are float32 at least.

    Raises:
      AdapterError: there are none, or some of another kind or on a quantised matrix, which cannot be merged.

    Example:
      >>> params = {"kernel": jnp.ones((2, 2)), "adapters": {"a": jnp.ones((2, 1)), "b": jnp.full((1, 2), 3.0)}}
      >>> merge(params, Lora([("kernel", 1)], alpha=2))["kernel"].tolist()
      [[7.0, 7.0], [7.0, 7.0]]
    """
    base = {name: tree for name, tree in params.items() if name != COLLECTION}
    flat = paths.flatten(base)
    modules = _modules(params.get(COLLECTION, {}))
    problems = [] if modules else [f"params have no {COLLECTION!r}."]
    for path, leaves in modules.items():
        if others := sorted(set(leaves) - set(Lora.names)):
            problems.append(f"{COLLECTION}/{path} has {', '.join(others)}, which is no lora and cannot be merged.")
        if any(name.startswith(join(path, "kernel/")) or name.startswith(join(path, "embedding/")) for name in flat):
            problems.append(
                f"{COLLECTION}/{path} adapts a quantised matrix; merge(dequantize(params), settings) does it."
            )
        elif not _kernel_path(path, flat):
            near = ", ".join(paths.nearest(path, flat)) or "none"
            problems.append(f"{COLLECTION}/{path} adapts a module that params do not have; nearest: {near}.")
    if problems:
        raise AdapterError.listing("merge", problems)
    places = {_kernel_path(path, flat): leaves for path, leaves in modules.items()}
    merged = {
        place: _merged(flat[place], settings.scale(leaves["a"].shape[-1]), **leaves) for place, leaves in places.items()
    }
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: merged.get(paths.path_of(keys), leaf), base)


def _modules(adapters: Tree) -> dict[str, Leaves]:
    """Leaves by name, by path of their module."""
    modules: dict[str, Leaves] = {}
    for path, leaf in paths.flatten(adapters).items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = leaf
    return modules


def _kernel_path(module: str, flat: Mapping[str, Any]) -> str:
    """The path of the module's matrix; "" where there is none."""
    names = [join(module, leaf) for leaf in dict.fromkeys(LEAVES.values())]
    return next((name for name in names if name in flat), "")


def _merged(kernel: Array, scale: float, *, a: Array, b: Array, magnitude: Array | None = None) -> Array:
    n_stack = (a.ndim + b.ndim - 2) - kernel.ndim
    multiply = product
    for _ in range(n_stack):
        multiply = jax.vmap(multiply)
    merged = wide(kernel) + scale * multiply(a, b)
    if magnitude is not None:
        n_inputs = a.ndim - n_stack - 1
        ratio = magnitude / length_of(merged, n_stack, n_inputs)
        merged = merged * jnp.expand_dims(ratio, tuple(range(n_stack, n_stack + n_inputs)))
    return merged.astype(kernel.dtype)


def combine(parts: Sequence[tuple[Tree, Lora, float]], *, base: Tree = None) -> tuple[Tree, Lora]:
    """Several adapters at once, as one: their branches, weighted, are added up.

    `a` and `b` are put side by side along the rank; weights and scales are multiplied into `b`.

    Args:
      parts: `(params["adapters"], settings, weight)` of each; they may adapt different modules.
      base: the parameters that they adapt. Only needed where as many layers are stacked as the rank is, so that the
        shapes do not tell one axis from the other.

    Returns:
      `(adapters, settings)` to be used, merged or trained on like any other, without dropout.

    Raises:
      AdapterError: no parts, DoRA (whose branches do not add up), other kinds, or shapes that do not go together.

    Example:
      >>> one = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}
      >>> adapters, settings = combine([(one, Lora([("kernel", 1)], alpha=2), 0.5), (one, Lora([("kernel", 1)]), 1.0)])
      >>> float(settings.scale(2) * (adapters["a"] @ adapters["b"])[0, 0])
      17.0
    """
    found = [(_modules(adapters), settings, weight) for adapters, settings, weight in parts]
    flat = {} if base is None else paths.flatten(base)
    groups = {
        path: [(modules[path], settings, weight) for modules, settings, weight in found if path in modules]
        for path in dict.fromkeys(path for modules, _, _ in found for path in modules)
    }
    problems, axes = [] if groups else ["there are no adapters; give at least one part."], {}
    for path, group in groups.items():
        try:
            axes[path] = _rank_axis([leaves for leaves, _, _ in group], flat.get(_kernel_path(path, flat)))
        except AdapterError as error:
            problems.append(f"{path} {error}")
    if problems:
        raise AdapterError.listing("combine", problems)
    ranks = {path: sum(leaves["a"].shape[-1] for leaves, _, _ in group) for path, group in groups.items()}
    rules = [(join(path, "(kernel|embedding)"), rank) for path, rank in ranks.items()]
    settings = Lora([*rules, (".*", None)], alpha=float(max(ranks.values())))
    joined = {}
    for path, group in groups.items():
        a, b = _side_by_side(group, settings.scale(ranks[path]), axes[path])
        joined.update({join(path, name): leaf for name, leaf in (("a", a), ("b", b))})
    return nest(joined), settings


def _rank_axis(group: Sequence[Leaves], kernel: Array | None) -> int:
    """The axis of `b` that is the rank: as many as there are stacked axes."""
    if any("magnitude" in leaves for leaves in group):
        raise AdapterError("is DoRA, and its branches do not add up; merge it into the base first.")
    if wrong := [sorted(leaves) for leaves in group if set(leaves) != {"a", "b"}]:
        raise AdapterError(f"has the leaves {wrong[0]}; lora's are a and b.")
    fits = [axis for axis in range(max(leaf.ndim for leaf in group[0].values())) if _is_rank_axis(axis, group, kernel)]
    if not fits:
        shapes = "; ".join(f"a {leaves['a'].shape}, b {leaves['b'].shape}" for leaves in group)
        raise AdapterError(f"has shapes of different modules: {shapes}.")
    if len(fits) > 1:
        raise AdapterError("has as many stacked layers as its rank; give base, which tells one from the other.")
    return fits[0]


def _is_rank_axis(axis: int, group: Sequence[Leaves], kernel: Array | None) -> bool:
    pairs = [(leaves["a"].shape, leaves["b"].shape) for leaves in group]
    shapes = {(a[:-1], b[:axis] + b[axis + 1 :]) for a, b in pairs}
    return len(shapes) == 1 and all(
        axis + 2 <= min(len(a), len(b))
        and b[axis] == a[-1]
        and b[:axis] == a[:axis]
        and (kernel is None or kernel.shape == (*a[:-1], *b[axis + 1 :]))
        for a, b in pairs
    )


def _side_by_side(group: Sequence[tuple[Leaves, Lora, float]], scale: float, axis: int) -> tuple[Array, Array]:
    factors = [weight * settings.scale(leaves["a"].shape[-1]) / scale for leaves, settings, weight in group]
    a = jnp.concatenate([leaves["a"] for leaves, _, _ in group], axis=-1)
    b = [leaves["b"] * factor for (leaves, _, _), factor in zip(group, factors, strict=True)]
    return a, jnp.concatenate(b, axis=axis)
