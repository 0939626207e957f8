"""What a checkpoint must contain, bit for bit: the hashes of its leaves and files.

A step folder counts as a checkpoint only if it holds a `manifest.json`, which is written last. The manifest names
every leaf (shape, dtype, sha256 of the value in memory at save time) and every file (size, sha256), and carries a
digest of itself: the text must be exactly what its content renders to, so that any flipped byte shows.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdl.errors import JaxdlError

FORMAT = 1
FILE_NAME = "manifest.json"


class CheckpointError(JaxdlError):
    """A checkpoint cannot be saved or restored."""


class CheckpointCorrupt(CheckpointError):
    """The bytes of a checkpoint are not those that were saved; another step may be good."""


class CheckpointMismatch(CheckpointError):
    """A good checkpoint of another model; an older step would not help."""


class LeafRecord(NamedTuple):
    """One leaf: its shape and dtype as JAX shows them, the hash of its value, and the generator of a typed key."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str = ""
    key_impl: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class FileRecord(NamedTuple):
    """One file of a step folder: its size in bytes and the hash of its content."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """The content of `manifest.json`; `leaves` and `files` map paths (with `/`) to records."""

    step: int
    leaves: dict[str, LeafRecord]
    files: dict[str, FileRecord]
    metadata: dict[str, Any]
    metrics: dict[str, Any]
    format: int = FORMAT


def hash_array(array: np.ndarray) -> str:
    """The sha256 of an array's dtype, shape and C-ordered bytes.

    Args:
      array: any shape, any dtype of fixed size (`bfloat16` and the like too).

    Example:
      >>> hash_array(np.float32([0.0])) == hash_array(np.float32([-0.0]))
      False
    """
    digest = hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode())
    if array.size:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_file(path: Path) -> FileRecord:
    """The size and sha256 of a file.

    Raises:
      OSError: the file is missing or cannot be read.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     hash_file(Path(file.name)).size
      0
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(file.tell(), digest.hexdigest())


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """Hashes every file under a folder except the manifest, and flushes each to the disk.

    Returns:
      `{relative posix path: FileRecord}`, sorted.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "data").write_text("abc")
      ...     {name: record.size for name, record in hash_files(Path(folder)).items()}
      {'data': 3}
    """
    records = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != FILE_NAME:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            records[name] = hash_file(path)
    return records


def to_json(what: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """The plain JSON form of a user's mapping: tuples become lists, NumPy values numbers, NaN and infinity null.

    Args:
      what: the argument's name, for the error.
      value: nested dicts, sequences, strings, numbers and arrays; None is an empty mapping.

    Raises:
      CheckpointError: a value or a key is none of these.

    Example:
      >>> to_json("metrics", {"loss": np.float32(0.5), "auc": float("nan")})
      {'auc': None, 'loss': 0.5}
    """
    try:
        plain = _plain(value or {})
        return json.loads(json.dumps(plain, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} must be JSON (dicts with str keys, lists, numbers, str): {error}.") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the keys {wrong} are not str")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(manifest: Manifest) -> str:
    """The text of `manifest.json`: sorted keys, with the sha256 of everything else under `digest`.

    Example:
      >>> parse(render(Manifest(3, {}, {}, {"note": "a"}, {}))).metadata
      {'note': 'a'}
    """
    body = {
        "format": manifest.format,
        "step": manifest.step,
        "metadata": manifest.metadata,
        "metrics": manifest.metrics,
        "leaves": {path: record._asdict() for path, record in manifest.leaves.items()},
        "files": {path: record._asdict() for path, record in manifest.files.items()},
    }
    return _with_digest(body)


def _with_digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({"digest": digest, **body}, sort_keys=True, indent=1, allow_nan=False) + "\n"


def parse(text: str) -> Manifest:
    """Reads what `render` wrote.

    Raises:
      CheckpointCorrupt: the text is not exactly what was written.
      CheckpointError: a newer jaxdl wrote it.

    Example:
      >>> parse(render(Manifest(3, {}, {}, {}, {})).replace("3", "4", 1))
      Traceback (most recent call last):
      jaxdl.checkpoint.manifest.CheckpointCorrupt: manifest.json is damaged: its digest does not fit its content
    """
    try:
        body = json.loads(text)
        del body["digest"]
        intact = _with_digest(body) == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointCorrupt(f"{FILE_NAME} is damaged: it is not the JSON that was written") from None
    if not intact:
        raise CheckpointCorrupt(f"{FILE_NAME} is damaged: its digest does not fit its content")
    if body["format"] > FORMAT:
        raise CheckpointError(
            f"{FILE_NAME} has format {body['format']}, this jaxdl reads up to {FORMAT}; update jaxdl."
        )
    leaves = {path: LeafRecord(**{**leaf, "shape": tuple(leaf["shape"])}) for path, leaf in body["leaves"].items()}
    files = {path: FileRecord(**record) for path, record in body["files"].items()}
    return Manifest(body["step"], leaves, files, body["metadata"], body["metrics"], body["format"])


def write(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically: a temporary file, flushed to the disk, then renamed.

    Raises:
      OSError: the disk is full or the folder cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(Path(folder), Manifest(3, {}, {}, {}, {}))
      ...     read(Path(folder)).step
      3
    """
    temporary = folder / (FILE_NAME + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(render(manifest))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE_NAME)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> Manifest:
    """Reads and checks the manifest of a step folder, and nothing else.

    Raises:
      CheckpointCorrupt: it is missing or damaged.

    Example:
      >>> read(Path("/nowhere/7"))
      Traceback (most recent call last):
      jaxdl.checkpoint.manifest.CheckpointCorrupt: no manifest.json: the save was cut off, or the copy is not complete
    """
    try:
        text = (folder / FILE_NAME).read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorrupt(f"no {FILE_NAME}: the save was cut off, or the copy is not complete") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointCorrupt(f"{FILE_NAME} cannot be read: {error}") from None
    return parse(text)


def verify(folder: Path) -> Manifest:
    """Checks the manifest of a step folder and every file it names; files it does not name are ignored.

    Args:
      folder: `<directory>/<step>`.

    Returns:
      The manifest.

    Raises:
      CheckpointCorrupt: lists every missing, truncated and altered file.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     folder = Path(name)
      ...     write(folder, Manifest(3, {}, {"data": FileRecord(5, "")}, {}, {}))
      ...     verify(folder)
      Traceback (most recent call last):
      jaxdl.checkpoint.manifest.CheckpointCorrupt: data is missing
    """
    manifest = read(folder)
    problems = []
    for name, expected in manifest.files.items():
        try:
            found = hash_file(folder / name)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error}")
        else:
            if found.size != expected.size:
                problems.append(f"{name} has {found.size} bytes, {expected.size} were written")
            elif found.sha256 != expected.sha256:
                problems.append(f"{name} is altered (its sha256 differs)")
    if problems:
        raise CheckpointCorrupt("; ".join(problems))
    return manifest


def check_leaves(records: Mapping[str, LeafRecord], arrays: Mapping[str, np.ndarray]) -> None:
    """Checks arrays that were read against the hashes taken from memory when they were saved.

    Args:
      records: what the manifest says.
      arrays: the values read, for the same paths; a typed key as its uint32 data.

    Raises:
      CheckpointCorrupt: names every leaf whose dtype, shape or value is not the saved one.

    Example:
      >>> one = np.ones(2, np.float32)
      >>> check_leaves({"a": LeafRecord((2,), "float32", hash_array(one))}, {"a": one})
    """
    bad = [path for path, record in records.items() if hash_array(arrays[path]) != record.sha256]
    if bad:
        raise CheckpointCorrupt(f"not the values that were saved: {', '.join(bad)}")
