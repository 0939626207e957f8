"""Models on disk, opened to be compared: runs, checkpoints, deltas, pretrained folders."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdl.checkpoint import CheckpointCorrupt, folders
from jaxdl.checkpoint import arrays as disk
from jaxdl.checkpoint import manifest as manifests
from jaxdl.checkpoint.leaves import add_hashes, describe
from jaxdl.checkpoint.manifest import LeafRecord
from jaxdl.errors import JaxdlError
from jaxdl.finetune.delta_folder import KEY
from jaxdl.paths import flatten
from jaxdl.pretrained import tensors
from jaxdl.pretrained.folder import load, unrolled

Read = Callable[[Sequence[str]], Mapping[str, Any]]


class Side(NamedTuple):
    """A model on disk.

    Attributes:
      name: what it is, for a reader.
      records: `{path: shape, dtype, sha256}` of the leaves that it holds; parameters by their path, the other
        collections under `extra/`.
      read: gives the values of some of them.
      base: `{path: first digits of the sha256}` of the leaves that a delta takes from its base.
      is_named_by_jaxdl: False for the tensors of a pretrained folder, which have the names of transformers.
    """

    name: str
    records: dict[str, LeafRecord]
    read: Read
    base: dict[str, str]
    is_named_by_jaxdl: bool = True


def open_side(path: str | os.PathLike[str], *, on_note: Callable[[str], object] = print) -> Side:
    """Finds out what a path is, and opens it; checkpoints and deltas are verified.

    Raises:
      JaxdlError: see `compare`.

    Example: see `compare`.
    """
    path = Path(path)
    if not path.exists():
        raise JaxdlError(f"{path} does not exist; give a run, a checkpoint, a pretrained folder or a delta.")
    if path.is_file() and path.suffix == ".safetensors":
        return _of_tensors(f"tensors {path}", tensors.read_file(path))
    if (path / manifests.FILE_NAME).is_file():
        try:
            return _of_step(path)
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"{path}: {error}.") from None
    for store in (path / "checkpoints", path):
        if folders.step_numbers(store):
            side, _, _ = folders.walk_back(store, _of_numbered_step, on_note=on_note)
            return side
    if path.is_dir() and any(path.glob("*.safetensors")):
        return _of_tensors(f"pretrained {path}", tensors.read_folder(path))
    raise JaxdlError(
        f"{path} is no run (checkpoints/), folder of checkpoints, checkpoint or delta ({manifests.FILE_NAME}), and "
        "holds no safetensors."
    )


def _of_numbered_step(folder: Path) -> Side:
    folders.read_manifest(folder)
    return _of_step(folder)


def _of_step(folder: Path) -> Side:
    manifest = manifests.verify(folder)
    is_delta = tensors.FILE in manifest.files or tensors.INDEX in manifest.files
    is_state = any(path.startswith("params/") for path in manifest.leaves)  # anything else is compared whole
    compared = [path for path in manifest.leaves if not is_state or path.startswith(("params/", "extra/"))]
    names = {_shown(path): path for path in compared}

    def read(paths: Sequence[str]) -> dict[str, np.ndarray]:
        records = {names[path]: manifest.leaves[names[path]] for path in paths}
        arrays = tensors.read_folder(folder) if is_delta else disk.read(folder, records)
        manifests.check_leaves(records, arrays)
        return {path: arrays[names[path]] for path in paths}

    base = manifest.metadata.get(KEY, {}).get("leaves", {})
    title = f"delta {folder}" if is_delta else f"step {manifest.step} in {folder.parent}"
    records = {path: manifest.leaves[name] for path, name in names.items()}
    return Side(title, records, read, {_shown(path): digits for path, digits in base.items()})


def _shown(path: str) -> str:
    return path.removeprefix("params/")


def _of_tensors(name: str, found: Mapping[str, np.ndarray]) -> Side:
    return _of_arrays(name, found, is_named_by_jaxdl=False)


def _of_arrays(name: str, arrays: Mapping[str, np.ndarray], *, is_named_by_jaxdl: bool = True) -> Side:
    records = add_hashes(describe(dict(arrays)), arrays)
    return Side(name, records, lambda paths: {path: arrays[path] for path in paths}, {}, is_named_by_jaxdl)


def as_params(side: Side, path: str | os.PathLike[str]) -> Side:
    """The side with the leaves of jaxdl's model in the place of a pretrained folder's tensors.

    Raises:
      PretrainedError: no family knows the folder, or it has no config.json.
    """
    return side if side.is_named_by_jaxdl else _of_params(side.name, load(path).params)


def is_scanned(side: Side) -> bool:
    """Whether layers lie in one array, under a child named `layers`.

    Example:
      >>> is_scanned(Side("it", {"encoder/layers/kernel": LeafRecord((2, 3), "float32")}, lambda paths: {}, {}))
      True
    """
    return any("layers" in path.split("/") for path in side.records)


def taken_apart(side: Side) -> Side:
    """The side with `layer_<i>` in the place of `layers`; what a delta takes from its base stays as it is."""
    params = unrolled(disk.nest(side.read(list(side.records))))
    return _of_params(side.name, jax.device_get(params))._replace(base=side.base)


def _of_params(name: str, params: Any) -> Side:
    return _of_arrays(name, {path: np.asarray(leaf) for path, leaf in flatten(params).items()})
