"""The modules of a model that adapters can stand at, found by an abstract call of the model."""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array

from jaxdl.paths import Tree, flatten

Shape = tuple[int, ...]
LEAVES = {nn.Dense: "kernel", nn.DenseGeneral: "kernel", nn.Conv: "kernel", nn.Embed: "embedding"}


class Site(NamedTuple):
    """A module, as it was called.

    Attributes:
      path: of the module, such as `encoder/layer_0/attention/query`.
      kind: its class.
      leaf: "kernel", "embedding", or None for a module that is no matrix.
      inputs, outputs: the axes of that leaf over which the module sums (of `nn.Embed` the rows), and that it makes.
      stack: the axes that `nn.scan` put before those of its parameters.
      output: shape and dtype where it gives a single array, else None.
      has_params: of its own or below it; without, `stack` is not known.
      problem: why the matrix cannot be adapted, or None.
    """

    path: str
    kind: type
    leaf: str | None
    inputs: Shape
    outputs: Shape
    stack: Shape
    output: jax.ShapeDtypeStruct | None
    has_params: bool
    problem: str | None

    @property
    def largest_rank(self) -> int:
        """That of the matrix."""
        return min(math.prod(self.inputs), math.prod(self.outputs))


class Survey(NamedTuple):
    """What is known of a model without running it.

    Attributes:
      sites: the modules that were called, by path.
      leaves: shapes and dtypes of the base's parameters, by path.
    """

    sites: dict[str, Site]
    leaves: dict[str, jax.ShapeDtypeStruct]


def survey(model: nn.Module, *inputs: Any, **kw: Any) -> Survey:
    """Looks at a model through an abstract `model.init`; nothing is computed.

    Args:
      model: a Linen module.
      inputs: of its call, arrays or shapes; `kw` likewise.
      kw: see there; what is no array is handed on as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> found = survey(nn.Dense(3), jnp.ones((4, 5)))
      >>> found.sites[""].inputs, found.sites[""].outputs, list(found.leaves)
      ((5,), (3,), ['bias', 'kernel'])
    """
    calls: dict[str, tuple[nn.Module, dict[str, Shape], Any]] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = next_fun(*args, **kwargs)
        if context.method_name in ("__call__", "attend"):
            own = flatten(context.module.variables.get("params", {}))
            shapes = {path: tuple(leaf.shape) for path, leaf in own.items()}
            calls.setdefault("/".join(context.module.path), (context.module, shapes, output))
        return output

    def init(key: Any, arrays: Any) -> Any:
        with nn.intercept_methods(record):
            args, given = arrays
            return model.init(key, *args, **given, **static)

    static = {name: value for name, value in kw.items() if not _is_arrays(value)}
    arrays = inputs, {name: value for name, value in kw.items() if name not in static}
    leaves = flatten(jax.eval_shape(init, jax.random.key(0), arrays).get("params", {}))
    return Survey({path: _site(path, *call, leaves) for path, call in calls.items()}, leaves)


def _is_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)


def _site(path: str, module: nn.Module, shapes: dict[str, Shape], output: Any, leaves: dict[str, Any]) -> Site:
    stack: Shape = ()
    problem = None
    for name, shape in shapes.items():
        outer = tuple(leaves[join(path, name)].shape)
        stack = outer[: len(outer) - len(shape)]
        if outer != (*stack, *shape):
            problem = f"is stacked along another axis than the first ({shape} became {outer})"
    leaf = next((leaf for kind, leaf in LEAVES.items() if isinstance(module, kind) and leaf in shapes), None)
    n = 0 if leaf is None else _n_inputs(module, len(shapes[leaf]))
    inputs, outputs = (shapes[leaf][:n], shapes[leaf][n:]) if leaf else ((), ())
    single = output if hasattr(output, "shape") and hasattr(output, "dtype") else None
    single = None if single is None else jax.ShapeDtypeStruct(single.shape, single.dtype)
    return Site(path, type(module), leaf, inputs, outputs, stack, single, bool(shapes), problem or _problem(module))


def _n_inputs(module: nn.Module, n_axes: int) -> int:
    if isinstance(module, nn.DenseGeneral):
        return n_axes - (1 if isinstance(module.features, int) else len(module.features))
    return n_axes - 1


def _problem(module: nn.Module) -> str | None:
    if isinstance(module, nn.DenseGeneral) and module.batch_dims:
        return f"has batch_dims={tuple(module.batch_dims)}, a matrix for each row"
    if isinstance(module, nn.Conv) and module.feature_group_count != 1:
        return f"is a convolution in {module.feature_group_count} groups, which is no single matrix"
    if isinstance(module, nn.Conv) and module.mask is not None:
        return "is a masked convolution, and the branch beside it would not be masked"
    return None


def key_of(key: Array, path: str) -> Array:
    """The key of a leaf: a function of the path, so that another target changes nothing here.

    Example:
      >>> bool((key_of(jax.random.key(0), "a") == key_of(jax.random.key(0), "b")).all())
      False
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def nest(flat: Mapping[str, Any]) -> Tree:
    """Nested dicts of leaves by path.

    Example:
      >>> nest({"head/a": 1, "head/b": 2})
      {'head': {'a': 1, 'b': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = leaf
    return tree


def join(module: str, name: str) -> str:
    """The path of a leaf of a module, whose own path is "" where it is the whole model.

    Example:
      >>> join("head", "kernel"), join("", "kernel")
      ('head/kernel', 'kernel')
    """
    return f"{module}/{name}" if module else name
