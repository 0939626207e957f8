"""Which rows of a batch the devices of this process hold, so that it reads no others."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl.parallel.mesh import DATA, batch_shardings
from jaxdl.paths import Tree

Block = tuple[int, int]
WHOLE: Block = (0, 1)


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether some devices of a mesh belong to other processes.

    Example:
      >>> spans_processes(None)
      False
    """
    return mesh is not None and not NamedSharding(mesh, P()).is_fully_addressable


def own_block(mesh: Mesh | None, n_rows: int) -> Block:
    """The smallest block of a batch that holds all rows of this process's devices.

    Args:
      mesh: where the batch will lie.
      n_rows: of the global batch.

    Returns:
      `(index, count)`, as for `Pipeline.shard`: the batch is cut into `count` blocks. `(0, 1)`, the whole batch, in a
      single process, and where the rows of a process do not lie side by side.

    Example:
      >>> own_block(None, 8)
      (0, 1)
    """
    if mesh is None or not spans_processes(mesh) or DATA not in mesh.shape:
        return WHOLE
    cuts = NamedSharding(mesh, P(DATA)).addressable_devices_indices_map((n_rows,))
    return _block([range(n_rows)[where[0]] for where in cuts.values() if where is not None], n_rows)


def _block(held: list[range], n_rows: int) -> Block:
    first, stop = min(rows.start for rows in held), max(rows.stop for rows in held)
    size = stop - first
    return WHOLE if n_rows % size or first % size else (first // size, n_rows // size)


def put_block(batch: Tree, mesh: Mesh, block: Block, *, n_leading: int = 0) -> Tree:
    """A batch on the devices of all processes, of which each gives its block.

    Args:
      batch: NumPy arrays with the rows of the block.
      mesh: where they go.
      block: from `own_block`.
      n_leading: as for `batch_shardings`.

    Raises:
      ShardingError: a dimension does not divide.

    Example:
      >>> from jaxdl.parallel.mesh import make_mesh
      >>> put_block({"x": np.arange(8)}, make_mesh(data=8), (0, 1))["x"].shape
      (8,)
    """
    index, count = block

    def grown(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = list(np.shape(leaf))
        shape[n_leading] *= count
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    wanted = jax.tree.map(grown, batch)

    def put(leaf: Any, whole: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        first, n_rows = index * leaf.shape[n_leading], whole.shape[n_leading]

        def part(where: Any) -> Any:
            rows = range(n_rows)[where[n_leading]]
            own = slice(rows.start - first, rows.stop - first)
            return leaf[(*where[:n_leading], own, *where[n_leading + 1 :])]

        return jax.make_array_from_callback(whole.shape, sharding, part)

    return jax.tree.map(put, batch, wanted, batch_shardings(wanted, mesh, n_leading=n_leading))


def local(tree: Tree) -> Tree:
    """Every leaf whole on the first device of this process, for programs of its own; all processes call it together.

    Example:
      >>> from jaxdl.parallel.mesh import make_mesh
      >>> local(jax.numpy.arange(2)).tolist()
      [0, 1]
    """
    return jax.tree.map(lambda x: gathered(x).addressable_data(0) if _is_global(x) else x, tree)


def gathered(leaf: Any) -> Any:
    """A leaf that is spread over processes, whole on every device; it ends before the next one begins."""
    if leaf.is_fully_replicated:
        return leaf
    return jax.block_until_ready(jax.jit(_same, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf))


def _is_global(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _same(x: jax.Array) -> jax.Array:
    return x


def settled(call: Any, mesh: Mesh | None, shardings: Tree | None) -> Any:
    """Makes a function `(...) -> (state, metrics)` whose state lies as told and whose metrics are whole everywhere.

    What XLA chooses for the results of a loop over steps need not be what the next call was compiled for.

    Args:
      call: the function.
      mesh: the devices; nothing is changed where None.
      shardings: of the state, from `state_shardings`; as XLA chooses where None.
    """
    if mesh is None:
        return call
    whole = NamedSharding(mesh, P())

    def settled_call(*args: Any) -> tuple[Any, Any]:
        state, metrics = call(*args)
        state = state if shardings is None else jax.lax.with_sharding_constraint(state, shardings)
        return state, jax.lax.with_sharding_constraint(metrics, whole)

    return settled_call
