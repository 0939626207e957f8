"""Three ways to run one step on many devices. They compute the same.

`jit_step` lets XLA cut the program by where its arrays lie. `shard_map_step` and `pmap_step` run the step on each
device's rows; the step itself then sums over the mapped axis, which `make_train_step(..., axis_name="data")` does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl.parallel.mesh import DATA, ShardingError, batch_shardings, put_batch
from jaxdl.parallel.sharding import constrained
from jaxdl.paths import Tree, flatten
from jaxdl.step import Step
from jaxdl.xla_options import compiler_options

Runner = Callable[[Any, Any], tuple[Any, dict[str, Any]]]


def jit_step(step: Step, mesh: Mesh, shardings: Tree) -> Runner:
    """Compiles a step for a mesh: XLA finds the collectives.

    Args:
      step: `(state, batch) -> (state, metrics)`, made without `axis_name`.
      mesh: the devices.
      shardings: of the state, from `state_shardings`; place it with `jax.device_put(state, shardings)`.

    Returns:
      `(state, batch) -> (state, metrics)`. The state is donated; rows of the batch are placed over `data`.

    Example:
      >>> import numpy as np
      >>> from jaxdl.parallel import make_mesh, REPLICATED, state_shardings
      >>> mesh = make_mesh(data=8)
      >>> run = jit_step(lambda w, batch: (w + batch.sum(), {}), mesh, state_shardings(REPLICATED, np.zeros(1), mesh))
      >>> run(jax.numpy.zeros(1), np.ones(16, np.float32))[0].tolist()
      [16.0]
    """
    whole = NamedSharding(mesh, P())
    compiled = jax.jit(
        constrained(step, mesh, shardings),
        in_shardings=(shardings, None),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
    return lambda state, batch: compiled(jax.device_put(state, shardings), put_batch(batch, mesh))


def mapped(step: Step, mesh: Mesh) -> Step:
    """Makes a step that runs `step` on each device's rows and holds the whole state on every device.

    A recurrent scan that XLA cuts by itself exchanges data at every time step; mapped, a device scans its own rows.

    Args:
      step: made with `axis_name="data"`.
      mesh: devices with the axis `data` alone.

    Returns:
      A step on global arrays, to be compiled, guarded, repeated or given to `fit` as any other.

    Raises:
      ShardingError: the mesh has other axes.
    """
    _check_axes(mesh)
    by_rows = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False)
    return functools.wraps(step)(by_rows)


def shard_map_step(step: Step, mesh: Mesh) -> Runner:
    """Runs a step on each device's rows, with the whole state on every device (`jax.shard_map`).

    Args:
      step: made with `axis_name="data"`.
      mesh: devices with the axis `data` alone.

    Returns:
      `(state, batch) -> (state, metrics)`; the state is donated.

    Raises:
      ShardingError: the mesh has other axes.
    """
    compiled = jax.jit(mapped(step, mesh), donate_argnums=0, compiler_options=compiler_options())
    whole = NamedSharding(mesh, P())
    return lambda state, batch: compiled(jax.device_put(state, whole), put_batch(batch, mesh))


def pmap_step(step: Step, mesh: Mesh) -> Runner:
    """Runs a step with `jax.pmap`, for code that is written for it; its batches are cut and its state copied here.

    Args:
      step: made with `axis_name="data"`.
      mesh: devices of this process with the axis `data` alone.

    Returns:
      `(state, batch) -> (state, metrics)`, as the other runners: no axis of devices in what comes and goes.

    Raises:
      ShardingError: the mesh has other axes, or devices of other processes.
    """
    _check_axes(mesh)
    if not NamedSharding(mesh, P()).is_fully_addressable:
        raise ShardingError("pmap_step runs in one process; use shard_map_step or jit_step on several.")
    by_device = jax.pmap(step, DATA, in_axes=(None, 0), out_axes=None, devices=list(mesh.devices.flat))
    n = mesh.size

    def run(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        batch_shardings(batch, mesh)  # says what does not divide
        return by_device(state, jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch))

    return run


def _check_axes(mesh: Mesh) -> None:
    others = [name for name, size in mesh.shape.items() if name != DATA and size > 1]
    if others or DATA not in mesh.shape:
        raise ShardingError(
            f"the mesh has the axes {', '.join(mesh.shape)}; this runner takes one, {DATA!r}: use jit_step."
        )


def unused_axes(mesh: Mesh, shardings: Tree) -> list[str]:
    """Axes of a mesh over which neither a batch nor a leaf of the state is cut: their devices do the same work twice.

    Example:
      >>> from jaxdl.parallel import make_mesh
      >>> mesh = make_mesh(data=4, modle=2)
      >>> unused_axes(mesh, {"w": NamedSharding(mesh, P())})
      ['modle']
    """
    used = {"data", "sequence"}
    for sharding in flatten(shardings).values():
        used |= {
            axis for axes in sharding.spec if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)
        }
    return [name for name, size in mesh.shape.items() if size > 1 and name not in used]
