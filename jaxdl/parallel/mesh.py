"""Devices in a grid whose axes have names.

Three names have a meaning for a batch: its rows lie over `data`, its second dimension over `sequence`, and nothing of
it over any other axis, such as `model`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl.errors import JaxdlError
from jaxdl.paths import Tree, flatten

DATA, SEQUENCE, MODEL = "data", "sequence", "model"


class ShardingError(JaxdlError):
    """Devices, arrays and rules that do not fit together; the message lists every problem at once."""


def make_mesh(*, devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Makes a mesh whose axes XLA may use as it likes (`AxisType.Auto`).

    Args:
      devices: what it is made of; all devices of all processes where None. The first ones are taken where more are
        given than the mesh needs, but then it must lie in one process.
      axes: name -> number of devices along it; one may be -1, for all that are left. `data=-1` where none is given.

    Raises:
      ShardingError: more devices are asked for than there are, a number that makes no sense, or devices that do not
        divide.

    Example:
      >>> dict(make_mesh(data=-1, model=2).shape)
      {'data': 4, 'model': 2}
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = _sizes(axes or {DATA: -1}, len(found))
    n = math.prod(sizes.values())
    if n < len(found) and len({device.process_index for device in found}) > 1:
        raise ShardingError(f"the mesh {_show(sizes)} leaves {len(found) - n} of {len(found)} devices out; take all.")
    grid = _grid(tuple(sizes.values()), found[:n])
    return Mesh(grid, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def _sizes(axes: dict[str, int], n: int) -> dict[str, int]:
    problems = [
        f"{name}={size} must be a number of devices, or -1 for all that are left."
        for name, size in axes.items()
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1)
    ]
    open_ = [name for name, size in axes.items() if size == -1]
    if len(open_) > 1:
        problems.append(f"only one axis can have what is left; {', '.join(open_)} ask for it.")
    if problems:
        raise ShardingError.listing("mesh", problems)
    fixed = math.prod(size for size in axes.values() if size != -1)
    if open_ and n % fixed:
        raise ShardingError(f"{n} devices do not divide by {fixed} ({_show(axes)}); nothing is left for {open_[0]}.")
    sizes = {name: n // fixed if size == -1 else size for name, size in axes.items()}
    if math.prod(sizes.values()) > n or 0 in sizes.values():
        raise ShardingError(f"the mesh {_show(axes)} needs {max(fixed, 1)} devices and there are {n}.")
    return sizes


def _grid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """In the order in which the hardware connects them, where it does."""
    if devices[0].platform == "cpu":
        return np.array(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)


def _show(axes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in axes.items())


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of `make_mesh` from text.

    Args:
      text: `data=4,model=2`; the empty text is `data=-1`.

    Raises:
      ShardingError: it is not of that form.

    Example:
      >>> parse_mesh("data=4,model=2"), parse_mesh("")
      ({'data': 4, 'model': 2}, {'data': -1})
    """
    axes: dict[str, int] = {}
    problems = []
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if not name.isidentifier() or not size.removeprefix("-").isdecimal():
            problems.append(f"{part!r} is not of the form axis=devices, such as data=4.")
        elif name in axes:
            problems.append(f"the axis {name} is there twice.")
        else:
            axes[name] = int(size)
    if problems:
        raise ShardingError.listing(f"the mesh {text!r}", problems)
    return axes or {DATA: -1}


def batch_shardings(batch: Tree, mesh: Mesh, *, n_leading: int = 0) -> Tree:
    """Where each array of a batch lies: rows over `data`, the second dimension over `sequence`.

    Args:
      batch: tree of arrays with rows first.
      mesh: has the axis `data`, `sequence`, or both.
      n_leading: further dimensions before the rows, such as the steps of `repeat`; they are not cut.

    Returns:
      A tree of `NamedSharding`s.

    Raises:
      ShardingError: a dimension does not divide.

    Example:
      >>> mesh = make_mesh(data=4, model=2)
      >>> tuple(batch_shardings({"label": np.zeros(8)}, mesh)["label"].spec)
      ('data',)
    """
    problems, found = [], {}
    for path, leaf in flatten(batch).items():
        shape = np.shape(leaf)
        names = [name if name in mesh.shape else None for name in (DATA, SEQUENCE)[: len(shape) - n_leading]]
        for i, name in enumerate(names):
            size = shape[n_leading + i]
            if name is not None and size % mesh.shape[name]:
                what = "rows" if name == DATA else f"positions in dimension {i}"
                problems.append(
                    f"{path} has {size} {what}, which do not divide over the {mesh.shape[name]} devices of the axis "
                    f"{name!r}; the nearest sizes that do: {_nearest(size, mesh.shape[name])}."
                )
        found[path] = NamedSharding(mesh, P(*[None] * n_leading, *_trimmed(names)))
    if problems:
        raise ShardingError.listing("the batch does not fit the mesh", problems)
    return jax.tree.unflatten(jax.tree.structure(batch), list(found.values()))


def _trimmed(names: list[Any]) -> list[Any]:
    while names and names[-1] is None:
        names = names[:-1]
    return names


def _nearest(size: int, n: int) -> str:
    below = size // n * n
    return ", ".join(str(near) for near in (below, below + n) if near)


def put_batch(batch: Tree, mesh: Mesh, *, n_leading: int = 0) -> Tree:
    """A batch of the host on the devices of a mesh; each process gives all rows and keeps those of its devices.

    Args:
      batch, mesh, n_leading: as for `batch_shardings`.

    Example:
      >>> put_batch({"x": np.arange(8)}, make_mesh(data=8))["x"].addressable_shards[1].data.tolist()
      [1]
    """
    return jax.tree.map(put, batch, batch_shardings(batch, mesh, n_leading=n_leading))


def put(leaf: Any, sharding: NamedSharding | None) -> jax.Array:
    """One array of the host, the same on every process, on the devices of a sharding; None is the first device."""
    if (
        sharding is None
        or sharding.is_fully_addressable
        or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
    ):
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
