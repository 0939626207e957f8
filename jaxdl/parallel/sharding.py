"""Where each array of a state lies: rules over paths, with mesh axes as values.

A rule list speaks of the whole `TrainState`. Since the path of a moment ends with that of its parameter
(`opt_state/adam/mu/dense/kernel`), one rule such as `(".*dense/kernel", Fsdp("data"))` places both.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl import paths
from jaxdl.parallel.mesh import ShardingError, batch_shardings
from jaxdl.paths import Rules, Tree

FLOOR_BYTES = 2**16


@dataclass(frozen=True)
class Split:
    """A rule value: one dimension is cut.

    Attributes:
      axis: of the mesh.
      dimension: of the array; from the end where negative, so that a kernel and a stack of kernels share a rule.
    """

    axis: str
    dimension: int = -1

    def problem(self, shape: tuple[int, ...], mesh: Mesh) -> str | None:
        if not -len(shape) <= self.dimension < len(shape):
            return f"shape {shape} has no dimension {self.dimension}; give another, or (path, None)."
        return _uneven(shape, self.dimension % len(shape), self.axis, mesh)

    def spec(self, shape: tuple[int, ...], itemsize: int, mesh: Mesh) -> P:
        return P(*[None] * (self.dimension % len(shape)), self.axis)

    @property
    def axes(self) -> tuple[str, ...]:
        return (self.axis,)


@dataclass(frozen=True)
class Fsdp:
    """A rule value: the largest dimension that divides is cut (fully sharded data parallelism, ZeRO stage 3).

    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models". XLA gathers an
    array where a layer needs it and scatters its gradient.

    Attributes:
      axis: of the mesh.
      floor_bytes: smaller arrays stay whole on every device: their transfer costs more than they weigh.
      beside: what cuts the array already; a dimension of its own is then left to it.
    """

    axis: str = "data"
    floor_bytes: int = FLOOR_BYTES
    beside: Split | None = None

    def problem(self, shape: tuple[int, ...], mesh: Mesh) -> str | None:
        return None if self.beside is None else self.beside.problem(shape, mesh)

    def spec(self, shape: tuple[int, ...], itemsize: int, mesh: Mesh) -> P:
        beside = () if self.beside is None else self.beside.spec(shape, itemsize, mesh)
        taken = [*beside, *[None] * (len(shape) - len(beside))]
        n = mesh.shape[self.axis]
        free = [i for i, size in enumerate(shape) if taken[i] is None and size % n == 0 and size >= n]
        if math.prod(shape) * itemsize >= self.floor_bytes and free:
            taken[max(free, key=lambda i: (shape[i], i))] = self.axis
        while taken and taken[-1] is None:  # as XLA writes it
            taken.pop()
        return P(*taken)

    @property
    def axes(self) -> tuple[str, ...]:
        return (self.axis, *(() if self.beside is None else self.beside.axes))


def fsdp(axis: str = "data", *, floor_bytes: int = FLOOR_BYTES) -> Fsdp:
    """The rule value that spreads arrays over an axis, see `Fsdp`.

    Example:
      >>> from jaxdl.parallel.mesh import make_mesh
      >>> tuple(fsdp("data").spec((512, 64), 4, make_mesh(data=8)))
      ('data',)
    """
    return Fsdp(axis, floor_bytes)


def state_shardings(rules: Rules, abstract_state: Tree, mesh: Mesh) -> Tree:
    """Where each leaf of a state lies.

    Args:
      rules: `(regex, value)` pairs over the paths of the state. A value is None (whole, on every device), a
        `PartitionSpec`, a `Split` or an `Fsdp`.
      abstract_state: the state, or its shapes from `jax.eval_shape`.
      mesh: the devices.

    Returns:
      A tree of `NamedSharding`s, for `jax.device_put`, `jit_step` and `fit`.

    Raises:
      RuleError: the rules do not fit the tree.
      ShardingError: an axis that the mesh lacks, a dimension that does not divide, a large array that `Fsdp` finds no
        dimension of, or a rule that cuts nothing: all in one message, before anything is compiled.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxdl.parallel.mesh import make_mesh
      >>> mesh = make_mesh(data=4, model=2)
      >>> params = {"kernel": jnp.zeros((256, 128)), "bias": jnp.zeros(128)}
      >>> rules = [("kernel", Fsdp("data", beside=Split("model"))), ("bias", Split("model"))]
      >>> {path: tuple(leaf.spec) for path, leaf in paths.flatten(state_shardings(rules, params, mesh)).items()}
      {'bias': ('model',), 'kernel': ('data', 'model')}
    """
    leaves = paths.flatten(abstract_state)
    # The structure alone decides who wins; the number of the rule stands for its value.
    numbers = paths.flatten(
        paths.match([(regex, i) for i, (regex, _) in enumerate(rules)], abstract_state, what="sharding")
    )
    problems: list[str] = []
    specs: dict[str, P] = {}
    for i, (regex, value) in enumerate(rules):
        own = {path: leaves[path] for path, number in numbers.items() if number == i}
        found, more = _place(f"rule {regex!r}", value, own, mesh)
        specs |= found
        problems += more or _idle(regex, value, own, specs, mesh)
    if problems:
        raise ShardingError.listing("the state does not fit the mesh", problems)
    placed = [NamedSharding(mesh, specs[path]) for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), placed)


def _place(name: str, value: Any, own: dict[str, Any], mesh: Mesh) -> tuple[dict[str, P], list[str]]:
    if value is None:
        return dict.fromkeys(own, P()), []
    if not isinstance(value, (P, Split, Fsdp)):
        return {}, [f"{name} has the value {value!r}; give None, a PartitionSpec, Split or Fsdp."]
    unknown = [axis for axis in _axes(value) if axis not in mesh.shape]
    if unknown:
        near = ", ".join(mesh.shape)
        return {}, [f"{name} names the axis {', '.join(map(repr, unknown))}; the mesh has {near}."]
    specs, problems = {}, []
    for path, leaf in own.items():
        problem = _spec_problem(value, leaf.shape, mesh) if isinstance(value, P) else value.problem(leaf.shape, mesh)
        if problem:
            problems.append(f"{path}: {problem}")
            continue
        specs[path] = value if isinstance(value, P) else value.spec(leaf.shape, itemsize(leaf), mesh)
        problems += _left_whole(path, value, leaf, specs[path], mesh)
    return specs, problems


def _idle(regex: str, value: Any, own: dict[str, Any], specs: dict[str, P], mesh: Mesh) -> list[str]:
    """A rule that cuts nothing; what a generated list has for the rest may, where the rules before it cut."""
    axes = [axis for axis in _axes(value) if mesh.shape[axis] > 1]
    looked_at = specs if regex == paths.REST else {path: specs[path] for path in own}
    if not own or not axes or any(_cuts(looked_at.values(), axis) for axis in axes):
        return []
    largest = max(own, key=lambda path: n_bytes(own[path]))
    return [
        f"rule {regex!r} cuts nothing: its largest array {largest} has {n_bytes(own[largest]):,} bytes, below "
        f"floor_bytes={getattr(value, 'floor_bytes', 0):,}; lower the floor, or give (regex, None)."
    ]


def _axes(value: Any) -> tuple[str, ...]:
    """The mesh axes that a rule value names."""
    if value is None:
        return ()
    return value.axes if isinstance(value, (Split, Fsdp)) else _names(value)


def _cuts(specs: Any, axis: str) -> bool:
    return any(axis in _names(spec) for spec in specs)


def _left_whole(path: str, value: Any, leaf: Any, spec: P, mesh: Mesh) -> list[str]:
    """A large array that Fsdp could not cut is a problem, never a silent copy on every device."""
    is_cut = value.axis in _names(spec) if isinstance(value, Fsdp) else True
    is_full = len(spec) == len(leaf.shape) and all(axes is not None for axes in spec)
    if is_cut or is_full or n_bytes(leaf) < value.floor_bytes:
        return []
    n = mesh.shape[value.axis]
    return [
        f"{path}: no free dimension of {leaf.shape} divides by the {n} devices of the axis {value.axis!r}; pad one to "
        f"a multiple of {n}, or put (path, None) before the rule."
    ]


def _spec_problem(spec: P, shape: tuple[int, ...], mesh: Mesh) -> str | None:
    if len(spec) > len(shape):
        return f"{spec} has {len(spec)} entries and the shape {shape} has {len(shape)} dimensions."
    for i, axes in enumerate(spec):
        problem = None if axes is None else _uneven(shape, i, axes, mesh)
        if problem:
            return problem
    return None


def _uneven(shape: tuple[int, ...], i: int, axes: Any, mesh: Mesh) -> str | None:
    n = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
    if shape[i] % n == 0:
        return None
    more = -(-shape[i] // n) * n
    return (
        f"dimension {i} of {shape} is {shape[i]}, which does not divide by the {n} devices of the axis {axes!r}; make "
        f"it {more}, or put (path, None) before the rule."
    )


def _names(spec: P) -> tuple[str, ...]:
    entries = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec]
    return tuple(axis for axes in entries for axis in axes)


def itemsize(leaf: Any) -> int:
    """Bytes of one entry; of a key, of its words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return int(jax.eval_shape(jax.random.key_data, leaf).size) * 4 // max(leaf.size, 1)
    return int(leaf.dtype.itemsize)


def n_bytes(leaf: Any) -> int:
    """Bytes of a whole array.

    Example:
      >>> n_bytes(jax.ShapeDtypeStruct((3, 2), "float32"))
      24
    """
    return math.prod(leaf.shape) * itemsize(leaf)


def bytes_per_device(tree: Tree, shardings: Tree) -> int:
    """What one device holds of a tree.

    Example:
      >>> from jaxdl.parallel.mesh import make_mesh
      >>> leaf = jax.ShapeDtypeStruct((8, 4), "float32")
      >>> bytes_per_device(leaf, NamedSharding(make_mesh(data=8), P("data")))
      16
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * itemsize(leaf) for leaf, sharding in pairs)


def constrained(step: Any, mesh: Mesh, shardings: Tree) -> Any:
    """Makes a step whose batch and new state lie as told, so that the next call finds the state where this one did.

    Args:
      step: `(state, batch) -> (state, metrics)`.
      mesh: the devices.
      shardings: of the state, from `state_shardings`.
    """

    @functools.wraps(step)
    def constrained_step(state: Any, batch: Any) -> tuple[Any, Any]:
        batch = jax.lax.with_sharding_constraint(batch, batch_shardings(batch, mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # where a model looks for an axis `sequence`
            state, metrics = step(state, batch)
        return jax.lax.with_sharding_constraint(state, shardings), metrics

    return constrained_step
