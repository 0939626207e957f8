"""A fine-tuned model as the leaves that its base lacks: a small folder to give away, verified on both sides.

It names the base that it was made on by the hash of every frozen leaf, and refuses another.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdl import paths
from jaxdl.checkpoint import CheckpointCorrupt, CheckpointError, CheckpointMismatch
from jaxdl.checkpoint import manifest as manifests
from jaxdl.checkpoint.leaves import add_hashes, not_finite, place, to_host
from jaxdl.checkpoint.manifest import LeafRecord, Manifest
from jaxdl.finetune.contract import Frozen, digest_of
from jaxdl.paths import Tree
from jaxdl.pretrained.tensors import read_folder, write_folder

KEY = "delta"  # in the metadata of a manifest: {"base": digest, "leaves": {path: first digits of its sha256}}
_N_DIGITS = 16


def base_record(frozen: Frozen) -> dict[str, Any]:
    """What the metadata of a manifest says of a base: its digest, and enough of each leaf's hash to name it.

    Example:
      >>> frozen = Frozen({"a": np.zeros(1), "b": np.zeros(1)}, {}, [("a", True), ("b", False)])
      >>> [len(digits) for digits in base_record(frozen)["leaves"].values()]
      [16]
    """
    return {"base": frozen.digest, "leaves": {path: text[:_N_DIGITS] for path, text in frozen.hashes.items()}}


def check_base(where: str, saved: Mapping[str, Any] | None, hashes: Mapping[str, str]) -> None:
    """Compares the leaves that a delta was made on with those at hand.

    Args:
      where: what holds the delta, for the message.
      saved: what `base_record` said.
      hashes: `{path: sha256}` of the frozen leaves at hand.

    Raises:
      CheckpointMismatch: every leaf that differs, or there is no record.

    Example:
      >>> frozen = Frozen({"a": np.zeros(1), "b": np.zeros(1)}, {}, [("a", True), ("b", False)])
      >>> check_base("it", base_record(frozen), frozen.hashes)
      >>> check_base("it", base_record(frozen), {"params/b": "0" * 64})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jaxdl.checkpoint.manifest.CheckpointMismatch: it was made on another base: 1 problem(s)
        - params/b has sha256 000000000000 in this base, ... in the one of the delta.
        Remedy: ...
    """
    if saved is None:
        raise CheckpointMismatch(f"{where} is no delta: it holds no hash of a base. Read it with checkpoint.Store.")
    if saved["base"] == digest_of(hashes):
        return
    was = saved["leaves"]
    problems = [f"{path} is not in this base." for path in was if path not in hashes]
    problems += [f"{path} is frozen here, but was not where the delta was made." for path in hashes if path not in was]
    problems += [
        f"{path} has sha256 {hashes[path][:12]} in this base, {digits[:12]} in the one of the delta."
        for path, digits in was.items()
        if path in hashes and not hashes[path].startswith(digits)
    ]
    more = [f"and {len(problems) - 8} more."] if len(problems) > 8 else []
    raise CheckpointMismatch(
        f"{CheckpointMismatch.listing(f'{where} was made on another base', problems[:8] + more)}\n  Remedy: give the "
        "very parameters that its run started from (the same pretrained folder, seed and dtype)."
    )


def save_delta(
    path: str | os.PathLike[str],
    params: Tree,
    extra: Tree,
    frozen: Frozen,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a fine-tuned model as the leaves that its base lacks; the folder appears complete or not at all.

    It holds everything that is not frozen: trained leaves, new heads, adapters, statistics. The format is
    `model.safetensors`, with names such as `params/head/kernel`, and the `manifest.json` of a checkpoint.

    Args:
      path: a folder that does not exist yet, or is empty.
      params, extra: the model after the run.
      frozen: the contract of the run, made from the model before it.
      metadata: JSON to keep beside it; the key "delta" is taken.

    Raises:
      ContractError: a frozen leaf is not what it was: the delta would lack the change.
      CheckpointError: the folder is not empty, `metadata` is not JSON, or a value is NaN or infinite.
      PretrainedError: a dtype that the format does not have.

    Example: see `load_delta`.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is not empty; give a new folder.")
    frozen.check(params, extra)
    flat = paths.flatten({"params": params, "extra": extra})
    arrays, records = to_host({name: leaf for name, leaf in flat.items() if name not in frozen.hashes})
    if problems := not_finite(arrays):
        raise CheckpointError.listing(f"{path} is not written: the model is not finite", problems)
    known = manifests.to_json("metadata", {**(metadata or {}), KEY: base_record(frozen)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_folder(temporary, arrays)
        files = manifests.hash_files(temporary)
        manifests.write(temporary, Manifest(0, add_hashes(records, arrays), files, known, {}))
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_delta(path: str | os.PathLike[str]) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Opens the folder of `save_delta`, every byte of it verified.

    Returns:
      `(manifest, {"params/...": array, "extra/...": array})`.

    Raises:
      CheckpointCorrupt: a file is missing or altered.
      CheckpointMismatch: it is a checkpoint, but no delta.

    Example: see `load_delta`.
    """
    path = Path(path)
    try:
        manifest = manifests.verify(path)
        if KEY not in manifest.metadata:
            raise CheckpointMismatch(f"{path} is no delta: it holds no hash of a base.")
        arrays = read_folder(path)
        manifests.check_leaves(manifest.leaves, arrays)
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{path}: {error}. Fetch the delta again.") from None
    return manifest, arrays


def load_delta(path: str | os.PathLike[str], params: Tree, extra: Tree = None) -> tuple[Tree, Tree]:
    """Puts a delta on its base.

    Args:
      path: the folder of `save_delta`.
      params: the base: nested dicts. Leaves that the delta has are replaced, whatever their shape (a new head), those
        that the base lacks (adapters) are added, the others are handed on as they are.
      extra: the other collections of the base; `{}` where None.

    Returns:
      `(params, extra)` of the fine-tuned model.

    Raises:
      CheckpointMismatch: it is another base, with the names of the leaves that differ; or the base has leaves that
        the fine-tuned model lacks.
      CheckpointCorrupt: the folder is damaged.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> base, tuned = {"body": jnp.ones(2)}, {"body": jnp.ones(2), "head": jnp.ones(3)}
      >>> frozen = Frozen(tuned, {}, [("head", True), (".*", False)])
      >>> with tempfile.TemporaryDirectory() as name:
      ...     save_delta(f"{name}/delta", tuned, {}, frozen)
      ...     load_delta(f"{name}/delta", base)
      ({'body': Array([1., 1.], dtype=float32), 'head': Array([1., 1., 1.], dtype=float32)}, {})
    """
    manifest, arrays = read_delta(path)
    base = {"params": params, "extra": {} if extra is None else extra}
    flat, wanted = paths.flatten(base), manifest.metadata[KEY]["leaves"]
    held, records = to_host({name: leaf for name, leaf in flat.items() if name in wanted})
    check_base(str(path), manifest.metadata[KEY], {p: r.sha256 for p, r in add_hashes(records, held).items()})
    if left := [name for name in flat if name not in wanted and name not in arrays]:
        lines = [f"{name} is only in the base." for name in left[:8]]
        more = [f"and {len(left) - 8} more."] if len(left) > 8 else []
        raise CheckpointMismatch(
            f"{CheckpointMismatch.listing(f'{path} is of a model without these leaves', lines + more)}\n  Remedy: take "
            "them out of the base first."
        )
    leaves = [_leaf(arrays[p], manifest.leaves[p], leaf) if p in arrays else leaf for p, leaf in flat.items()]
    tree = jax.tree.unflatten(jax.tree.structure(base), leaves)
    for name in arrays.keys() - flat.keys():
        tree = _with_leaf(tree, name.split("/"), _leaf(arrays[name], manifest.leaves[name], None), name)
    return tree["params"], tree["extra"]


def _leaf(array: np.ndarray, record: LeafRecord, like: Any) -> Any:
    """An array of JAX; on the devices of the leaf that it replaces if it has that one's shape."""
    same = isinstance(like, jax.Array) and (like.shape, str(like.dtype)) == (record.shape, record.dtype)
    leaf = place(array, record, like if same else jax.ShapeDtypeStruct(array.shape, array.dtype))
    if str(leaf.dtype) != record.dtype:
        raise CheckpointError(f"a leaf is {record.dtype}, which JAX makes {leaf.dtype}; set jax_enable_x64 first.")
    return leaf


def _with_leaf(tree: Any, names: list[str], leaf: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise CheckpointMismatch(f"{path} has no place in a base with a {type(tree).__name__} there; nest dicts only.")
    rest = names[1:]
    return {**tree, names[0]: _with_leaf(tree.get(names[0], {}), rest, leaf, path) if rest else leaf}
