"""Fashion-MNIST, MNIST and other sets in four gzipped IDX files."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from jaxdl.data.sources import ArraySource
from jaxdl.data.splits import check_labels
from jaxdl.errors import JaxdlError

_DEBIAN = "/usr/share/datasets/fashion-mnist"
_REMEDY = (
    "install the Debian/Ubuntu package dataset-fashion-mnist (it puts them under " + _DEBIAN + "), or download the four"
    " files from https://github.com/zalandoresearch/fashion-mnist and name their folder with directory= or the"
    " environment variable JAXDL_FASHION_MNIST_DIR"
)


def load_fashion_mnist(directory: str | Path | None = None) -> tuple[ArraySource, ArraySource]:
    """70,000 grey images of clothes, 28 x 28, ten classes, in the official split.

    Args:
      directory: the folder of the four files `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`. None looks where
        JAXDL_FASHION_MNIST_DIR points, else where the Debian package puts them. Nothing is downloaded.

    Returns:
      `(train, test)` with 60,000 and 10,000 rows: "image" uint8 (n, 28, 28, 1), "label" int32 (n,) in 0..9. The images
      stay uint8, a quarter of the memory, until a transform such as `fit_standardize` makes them float32.

    Raises:
      JaxdlError: files that are missing (says where to get them), truncated, or not what their name says.

    Source: Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST", arXiv:1708.07747; MIT licence.

    Example:
      >>> train, test = load_fashion_mnist()  # doctest: +SKIP
      >>> len(train), len(test)  # doctest: +SKIP
      (60000, 10000)
    """
    return load_idx(directory or os.environ.get("JAXDL_FASHION_MNIST_DIR") or _DEBIAN, remedy=_REMEDY)


def load_idx(
    directory: str | Path, *, n_classes: int = 10, remedy: str = "put them there"
) -> tuple[ArraySource, ArraySource]:
    """Reads the four files of a set in the form of MNIST (MNIST itself, KMNIST, EMNIST digits).

    Args:
      directory: the folder of `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, each with or without `.gz`.
      n_classes: labels must lie in 0 .. n_classes - 1.
      remedy: what the error says about missing files.

    Returns:
      `(train, test)`: "image" uint8 (n, H, W, 1), "label" int32 (n,).

    Raises:
      JaxdlError: files that are missing, truncated or not IDX; counts that differ; labels out of range.

    Example:
      >>> train, test = load_idx("data/mnist")  # doctest: +SKIP
    """
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    found = [_find(Path(directory), name) for name in names]
    missing = [f"{name}.gz" for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise JaxdlError(f"{', '.join(missing)} not found in {directory}; {remedy}.")
    paths = [path for path in found if path is not None]
    return _pair(paths[0], paths[1], n_classes), _pair(paths[2], paths[3], n_classes)


def _find(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / f"{name}.gz", directory / name) if path.is_file()), None)


def _pair(image_path: Path, label_path: Path, n_classes: int) -> ArraySource:
    image, label = read_idx(image_path, n_axes=3), read_idx(label_path, n_axes=1)
    if len(image) != len(label):
        raise JaxdlError(
            f"{image_path} holds {len(image)} images and {label_path.name} {len(label)} labels; the files do not belong"
            " together: get both again."
        )
    check_labels(label, n_classes)
    return ArraySource({"image": image[..., None], "label": label.astype(np.int32)})


def read_idx(path: str | Path, *, n_axes: int | None = None) -> np.ndarray:
    """Reads one IDX file of unsigned bytes.

    The format: bytes 0, 0, 8 (unsigned byte), the number of axes, each axis as a big-endian int32, then the values.

    Args:
      path: the file, gzipped if it ends in `.gz`.
      n_axes: how many axes there must be.

    Returns:
      uint8 array, read-only.

    Raises:
      JaxdlError: not an IDX file, another number of axes, or bytes missing or left over; names the file.

    Source: Y. LeCun, "The MNIST database of handwritten digits", section on the file formats.

    Example:
      >>> read_idx("train-labels-idx1-ubyte.gz")[:3]  # doctest: +SKIP
      array([9, 0, 0], dtype=uint8)
    """
    content = _content(Path(path))
    axes = content[3] if len(content) >= 4 else 0
    expected = "" if n_axes is None else f" of {n_axes} axes"
    if content[:3] != b"\0\0\x08" or axes == 0 or (n_axes is not None and axes != n_axes):
        raise JaxdlError(
            f"{path} begins with {content[:4].hex(' ') or 'nothing'}, which is no IDX file of bytes{expected}"
            f" (00 00 08 {(n_axes or 1):02x}); is it another file under this name? Get it again."
        )
    begin = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", content[4:begin].ljust(4 * axes, b"\0"))
    if len(content) != begin + math.prod(shape):
        raise JaxdlError(
            f"{path} holds {len(content)} bytes where its header says {begin + math.prod(shape)}; get it again."
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise JaxdlError(f"{path} is truncated or not gzipped ({error}); get it again.") from error
    except OSError as error:
        raise JaxdlError(f"{path} cannot be read ({error.strerror}); check the path.") from error
