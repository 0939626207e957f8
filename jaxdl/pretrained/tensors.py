"""Tensors on disk in the safetensors format (github.com/huggingface/safetensors): memory-mapped in, atomic out.

A file is a length (8 bytes, little endian), a JSON header `{name: {dtype, shape, data_offsets}}`, and the bytes. A
model of several files has an index `model.safetensors.index.json` that names the file of every tensor.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdl.pretrained.ledger import PretrainedError, shortened

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


def read_folder(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Opens all tensors of a folder; the bytes are read when an array is used.

    Args:
      folder: holds `model.safetensors`, or the files that `model.safetensors.index.json` names.

    Returns:
      `{name: memory-mapped read-only array}`, in the dtypes of the file (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
      PretrainedError: pickles only, files missing, broken or short, tensors that an index promises and no file has.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     write_folder(name, {"w": np.float32([1, 2])})
      ...     read_folder(name)["w"].tolist()
      [1.0, 2.0]
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / FILE).exists():
        return read_file(folder / FILE)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickles:
        raise PretrainedError(
            f"{folder} holds its weights as a pickle only ({', '.join(pickles[:3])}); reading a pickle can run any "
            "code, so jaxdl does not. On a machine where you trust the file, convert it with transformers: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)."
        )
    found = f"; it has {', '.join(others[:4])}, so rename the one you mean" if others else ""
    raise PretrainedError(f"{folder} has no {FILE} and no {INDEX}{found}.")


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    try:
        files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        shards = sorted({"".join(file) for file in files.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(
            f"{folder / INDEX} is no index of tensors ({error!r}); fetch the file again, or delete it where there is "
            f"one {FILE}."
        ) from None
    outside = [shard for shard in shards if Path(shard).name != shard]
    missing = [shard for shard in shards if shard not in outside and not (folder / shard).is_file()]
    problems = [f"the index names {shard!r}, which is no plain file name." for shard in outside]
    problems += [f"{shard} is missing: {_count(files, shard)} tensor(s) of the index; fetch it." for shard in missing]
    tensors: dict[str, np.ndarray] = {}
    for shard in (shard for shard in shards if shard not in missing and shard not in outside):
        try:
            found = read_file(folder / shard)
        except PretrainedError as error:
            problems.append(str(error))
            continue
        absent = [name for name, file in files.items() if file == shard and name not in found]
        extra = [name for name in found if files.get(name) != shard]
        lines = [f"{name} is in the index under {shard}, but not in that file." for name in absent]
        lines += [f"{name} is in {shard}, but the index says {files.get(name, 'nothing of it')}." for name in extra]
        problems += shortened(lines, "tensors")
        tensors.update(found)
    if problems:
        raise PretrainedError.listing(f"{folder} is not complete", problems)
    return tensors


def _count(files: Mapping[str, str], shard: str) -> int:
    return sum(file == shard for file in files.values())


def read_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Opens one safetensors file, as `read_folder` does.

    Raises:
      PretrainedError: the header is broken, or the file is shorter or longer than its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _header(file.read(8), file.read, size)
            problem = _layout_problem(header, size - start)
            if problem:
                raise ValueError(problem)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = error.args[0] if isinstance(error, ValueError) and error.args else f"its header is broken ({error!r})"
        raise PretrainedError(f"{path} is damaged: {why}; fetch it again.") from None
    return {name: _view(data, start, record) for name, record in header.items()}


def _header(length: bytes, read: Any, size: int) -> tuple[dict[str, dict[str, Any]], int]:
    n = int.from_bytes(length, "little")
    if len(length) < 8 or n > min(size - 8, _MOST_HEADER_BYTES):
        raise ValueError(f"a file of {size} bytes cannot hold a header of {n} bytes")
    try:
        header = json.loads(read(n).decode())
    except ValueError as error:
        raise ValueError(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + n


def _layout_problem(header: Mapping[str, dict[str, Any]], n_bytes: int) -> str | None:
    """None, or why the header and the data behind it disagree: every byte must belong to exactly one tensor."""
    position = 0
    for name, record in sorted(header.items(), key=lambda item: (*item[1]["data_offsets"], item[0])):
        begin, end = record["data_offsets"]
        if record["dtype"] not in DTYPES:
            return f"{name} has the dtype {record['dtype']!r}; known are {', '.join(DTYPES)}"
        if not all(isinstance(n, int) and n >= 0 for n in record["shape"]):
            return f"{name} has the shape {record['shape']}"
        wanted = math.prod(record["shape"]) * np.dtype(DTYPES[record["dtype"]]).itemsize
        if begin != position or end - begin != wanted:
            return f"{name} takes bytes {begin} to {end}, but should take {wanted} from {position}"
        position = end
    if position != n_bytes:
        return f"its header speaks of {position} bytes of data and {n_bytes} are there"
    return None


def _view(data: mmap.mmap, start: int, record: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = np.dtype(DTYPES[record["dtype"]]), tuple(record["shape"])
    n = math.prod(shape)
    if n == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, n, start + record["data_offsets"][0]).reshape(shape)


def write_folder(
    folder: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes tensors so that transformers reads them: one file, or several with an index.

    A reader never sees half a file: each gets its name when it is complete, the index last.

    Args:
      folder: exists.
      tensors: `{name: array}`.
      max_shard_bytes: of data in one file; a larger tensor has a file of its own.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     write_folder(name, {"a": np.zeros(4), "b": np.zeros(4)}, max_shard_bytes=32)
      ...     sorted(path.name for path in Path(name).iterdir())[0]
      'model-00001-of-00002.safetensors'
    """
    folder = Path(folder)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(folder / FILE, shards[0])
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    write_atomically(folder / INDEX, [json.dumps(index, indent=2).encode()])


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file, complete or not at all.

    Raises:
      PretrainedError: a dtype that the format does not have.
    """
    unknown = [f"{name} is {x.dtype}; cast it to a float." for name, x in tensors.items() if x.dtype not in NAMES]
    if unknown:
        raise PretrainedError.listing(f"{path.name} cannot hold these", shortened(unknown, "tensors"))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    chunks = (np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in tensors.values() if x.size)
    write_atomically(path, [len(text).to_bytes(8, "little"), text], chunks)


def write_atomically(path: Path, *parts: Iterable[Any]) -> None:
    """Writes bytes under another name, flushes them to the disk, then renames.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     write_atomically(Path(name, "a"), [b"one ", b"two"])
      ...     Path(name, "a").read_text(), len(os.listdir(name))
      ('one two', 1)
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                for chunk in part:
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
