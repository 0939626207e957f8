"""Leaves between the device and the disk: copies in host memory, their records, and arrays made from them again."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.checkpoint.manifest import CheckpointError, LeafRecord, hash_array
from jaxdl.parallel.mesh import put
from jaxdl.parallel.rows import gathered
from jaxdl.paths import Tree, flatten, nearest


def describe(tree: Tree) -> dict[str, LeafRecord]:
    """The shape and dtype of every leaf, without hashes.

    Args:
      tree: concrete or abstract (`jax.eval_shape`); arrays of JAX or NumPy, typed keys, and Python numbers,
        which count as the arrays that `jnp.asarray` makes of them.

    Raises:
      CheckpointError: names every leaf that is none of these.

    Example:
      >>> records = describe({"kernel": np.zeros((2, 3), np.int8), "rng": jax.random.key(0)})
      >>> str(records["kernel"]), str(records["rng"])
      ('int8[2,3]', 'key<fry>[]')
    """
    flat = flatten(tree)
    wrong = [
        f"{path} is a {type(leaf).__name__}, not an array of numbers."
        for path, leaf in flat.items()
        if not _is_leaf(leaf)
    ]
    if wrong:
        raise CheckpointError.listing("a state holds arrays only", wrong)
    arrays = {path: jnp.asarray(leaf) if _is_number(leaf) else leaf for path, leaf in flat.items()}
    return {path: LeafRecord(tuple(leaf.shape), str(leaf.dtype)) for path, leaf in arrays.items()}


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)  # np.float64 is a float


def _is_leaf(leaf: Any) -> bool:
    if _is_number(leaf):
        return True
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)):
        return False
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return is_key or jnp.issubdtype(leaf.dtype, jnp.number) or jnp.issubdtype(leaf.dtype, jnp.bool_)


def differences(saved: Mapping[str, LeafRecord], wanted: Mapping[str, LeafRecord]) -> list[str]:
    """Every way in which a checkpoint is not one of this model; empty if it is.

    Args:
      saved: the leaves of the checkpoint.
      wanted: the leaves of the model's state.

    Example:
      >>> differences({"kernel": LeafRecord((2, 3), "float32")}, {"kernel": LeafRecord((2, 4), "float32")})
      ['kernel is float32[2,3] in the checkpoint, float32[2,4] in the model.']
    """
    problems = []
    for path, record in wanted.items():
        if path not in saved:
            near = ", ".join(nearest(path, saved)) or "it is empty"
            problems.append(f"{path} {record} is not in the checkpoint; nearest there: {near}.")
        elif (saved[path].shape, saved[path].dtype) != (record.shape, record.dtype):
            problems.append(f"{path} is {saved[path]} in the checkpoint, {record} in the model.")
    for path in saved:
        if path not in wanted:
            near = ", ".join(nearest(path, wanted)) or "it is empty"
            problems.append(f"{path} {saved[path]} is only in the checkpoint; nearest in the model: {near}.")
    return problems


def to_host(tree: Tree, *, is_kept: bool = True) -> tuple[dict[str, np.ndarray], dict[str, LeafRecord]]:
    """Copies every leaf to host memory, so that nothing that happens to the tree later can change the copy.

    A leaf that is spread over processes is gathered first, one after the other: for that moment every device holds
    one leaf whole beside its part of the tree. All processes must come here together then.

    Args:
      tree: concrete leaves.
      is_kept: False, in all processes but the one that wants the copies, takes part in gathering and keeps nothing.

    Returns:
      `(arrays, records)` by path. A typed key is copied as its uint32 data. The records have no hashes yet.

    Raises:
      CheckpointError: names every leaf that is abstract, not of numbers or deleted.

    Example:
      >>> arrays, records = to_host({"step": jnp.int32(3)})
      >>> arrays["step"], str(records["step"])
      (array(3, dtype=int32), 'int32[]')
    """
    records, flat = describe(tree), flatten(tree)
    problems = [f"{path} {problem}" for path, leaf in flat.items() if (problem := _unreadable(leaf))]
    if problems:
        raise CheckpointError.listing("a state to save must be readable here", problems)
    for path, leaf in flat.items():
        if _is_number(leaf):
            flat[path] = jnp.asarray(leaf)
        elif jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            records[path] = records[path]._replace(key_impl=str(jax.random.key_impl(leaf)))
            flat[path] = jax.random.key_data(leaf)
    for leaf in flat.values() if is_kept else ():
        if isinstance(leaf, jax.Array) and not _is_spread(leaf):
            leaf.copy_to_host_async()
    arrays = {}
    for path, leaf in flat.items():
        whole = gathered(leaf) if _is_spread(leaf) else leaf
        if is_kept:
            arrays[path] = np.array(whole, copy=True, order="C")
    return arrays, records


def _is_spread(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _unreadable(leaf: Any) -> str | None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "is abstract (a ShapeDtypeStruct); give the state itself."
    if isinstance(leaf, (np.ndarray, np.generic)) and not leaf.dtype.isnative:
        return f"has the foreign byte order {leaf.dtype.str}; convert it."
    if not isinstance(leaf, jax.Array):
        return None
    if leaf.is_deleted():
        return "was donated to a jitted function and is gone; save the state that the function returned."
    if _is_spread(leaf) and not isinstance(leaf.sharding, jax.NamedSharding):
        return f"is spread over processes by {leaf.sharding}; place it with a NamedSharding."
    return None


def add_hashes(records: Mapping[str, LeafRecord], arrays: Mapping[str, np.ndarray]) -> dict[str, LeafRecord]:
    """The records of `to_host` with the hash of every array.

    Example:
      >>> arrays, records = to_host({"step": jnp.int32(3)})
      >>> len(add_hashes(records, arrays)["step"].sha256)
      64
    """
    return {path: record._replace(sha256=hash_array(arrays[path])) for path, record in records.items()}


def not_finite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """One line for every array that holds a NaN or an infinity.

    An infinite scalar is let through: optimizers use it for "no value yet", as reduce-on-plateau does.

    Example:
      >>> not_finite({"a": np.float32([1.0, np.nan]), "b": np.int32([1])})
      ['a: 1 of 2 values are NaN or infinite.']
    """
    lines = []
    for path, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact):
            is_good = np.isfinite(array) if array.ndim else ~np.isnan(array)
            n_bad = int(array.size - np.count_nonzero(is_good))
            lines += [f"{path}: {n_bad} of {array.size} values are NaN or infinite."] if n_bad else []
    return lines


def place(array: np.ndarray, record: LeafRecord, like: Any) -> Any:
    """Makes a leaf of the kind of `like` out of a host array.

    A JAX leaf is placed as a fresh one would be: on the sharding of `like` if that has one it is committed to, else
    uncommitted, and weakly typed if `like` is (so a step that was compiled for the fresh state is not traced again).

    Args:
      array: host values, as `to_host` gives them.
      record: what the values are.
      like: an abstract or concrete leaf of the same shape and dtype, a NumPy array, or a Python number.

    Raises:
      CheckpointError: the devices of `like` cannot take the array.

    Example:
      >>> place(np.int32(3), LeafRecord((), "int32"), jnp.int32(0)).committed
      False
    """
    if _is_number(like):
        return array.item()
    if isinstance(like, (np.ndarray, np.generic)):
        return array if isinstance(like, np.ndarray) else array[()]
    sharding = None if isinstance(like, jax.Array) and not like.committed else like.sharding
    try:
        return put(_to_jax(array, record, weak=getattr(like, "weak_type", False)), sharding)
    except Exception as error:
        raise CheckpointError(f"cannot place {record} on {sharding}: {error}") from None


def _to_jax(array: np.ndarray, record: LeafRecord, *, weak: bool) -> Any:
    if record.key_impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=record.key_impl)
    if weak and array.ndim == 0:  # only a Python number makes a weak type through JAX's public functions
        number = jnp.asarray(array.item())
        return number if number.dtype == array.dtype else array
    return array
