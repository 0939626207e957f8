"""Sums whose order is fixed: neighbours are added, then neighbouring sums, on one device or over several."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl.parallel.mesh import DATA
from jaxdl.paths import Tree

Array = jax.Array


def pack(tree: Tree) -> dict[str, Array]:
    """All leaves of a dtype as one vector, (1, N)."""
    by_dtype: dict[str, list[Array]] = {}
    for leaf in map(jnp.asarray, jax.tree.leaves(tree)):
        by_dtype.setdefault(str(leaf.dtype), []).append(leaf.reshape(1, -1))
    return {dtype: jnp.concatenate(parts, 1) for dtype, parts in by_dtype.items()}


def unpack(vectors: dict[str, Array], shapes: Tree) -> Tree:
    """The inverse of `pack`.

    Example:
      >>> tree = {"a": jnp.arange(3), "b": jnp.ones((2, 1))}
      >>> jax.tree.map(jnp.shape, unpack(pack(tree), jax.eval_shape(lambda: tree)))
      {'a': (3,), 'b': (2, 1)}
    """
    leaves, treedef = jax.tree.flatten(shapes)
    begins, found = dict.fromkeys(vectors, 0), []
    for leaf in leaves:
        dtype, size = str(leaf.dtype), int(np.prod(leaf.shape))
        found.append(vectors[dtype][0, begins[dtype] : begins[dtype] + size].reshape(leaf.shape))
        begins[dtype] += size
    return jax.tree.unflatten(treedef, found)


class TreeSum:
    """Adds neighbours, then neighbouring sums, and so on; holds as few sums as there are levels.

    Args:
      add: `(a, b) -> a + b`.

    Example:
      >>> total = TreeSum(lambda a, b: f"({a}{b})")
      >>> for part in "abcdefgh":
      ...     total.push(part)
      >>> total.finish()
      '(((ab)(cd))((ef)(gh)))'
    """

    def __init__(self, add: Callable[[Any, Any], Any]) -> None:
        self._add = add
        self._open: list[tuple[int, Any]] = []

    def push(self, part: Any) -> None:
        level = 0
        while self._open and self._open[-1][0] == level:
            level, part = level + 1, self._add(self._open.pop()[1], part)
        self._open.append((level, part))

    def finish(self) -> Any:
        """The sum of all parts, a power of two of them."""
        ((_, total),) = self._open
        return total


def make_exchange(mesh: Mesh) -> Any:
    """The same pairs among devices: each adds what its neighbour has, then what the next pair has, and so on.

    Returns:
      A function of global arrays, a row a device; each row of what it returns is the sum of all.

    Example:
      >>> from jaxdl.parallel.mesh import make_mesh
      >>> make_exchange(make_mesh(data=4))(jnp.arange(4.0))
      Array([6., 6., 6., 6.], dtype=float32)
    """

    def exchange(sums: Any) -> Any:
        distance = 1
        while distance < mesh.size:
            pairs = [(i, i ^ distance) for i in range(mesh.size)]
            sums = add(sums, jax.lax.ppermute(sums, DATA, pairs))
            distance *= 2
        return sums

    return jax.shard_map(exchange, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA), check_vma=False)


def add(a: Tree, b: Tree) -> Tree:
    """Leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def views(tree: Tree) -> list[Tree]:
    """What each device of this process holds of global arrays; nothing is copied."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [[shard.data for shard in leaf.addressable_shards] for leaf in leaves]
    return [jax.tree.unflatten(treedef, row) for row in zip(*columns, strict=True)]


def join(trees: list[Tree], sharding: NamedSharding, shape: Any) -> Tree:
    """Global arrays of what each device of this process holds; nothing is copied."""
    return jax.tree.map(
        lambda *leaves: jax.make_array_from_single_device_arrays(shape(leaves[0].shape), sharding, list(leaves)), *trees
    )
