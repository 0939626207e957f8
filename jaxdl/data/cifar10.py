"""CIFAR-10 from its original binary files."""

from pathlib import Path

import numpy as np

from jaxdl.data.sources import ArraySource
from jaxdl.data.splits import check_labels
from jaxdl.errors import JaxdlError

_N_BYTES = 1 + 3 * 32 * 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cifar10(directory: str | Path) -> tuple[ArraySource, ArraySource]:
    """60,000 colour images, 32 x 32, ten classes, in the official split.

    Args:
      directory: the folder of `data_batch_1.bin` .. `data_batch_5.bin` and `test_batch.bin`, the unpacked "binary
        version" of the set (the Python version is made of pickles, which can run code, and is not read).

    Returns:
      `(train, test)`: "image" uint8 (n, 32, 32, 3), "label" int32 (n,) in 0..9, named by `CIFAR10_CLASSES`.

    Raises:
      JaxdlError: files that are missing (says where to get them) or truncated; labels out of range.

    Source: A. Krizhevsky 2009, "Learning multiple layers of features from tiny images".

    Example:
      >>> train, test = load_cifar10("cifar-10-batches-bin")  # doctest: +SKIP
    """
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    missing = [name for name in names if not (Path(directory) / name).is_file()]
    if missing:
        raise JaxdlError(
            f"{', '.join(missing)} not found in {directory}; download cifar-10-binary.tar.gz from"
            " https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and give the folder cifar-10-batches-bin."
        )
    records = [_records(Path(directory) / name) for name in names]
    return _source(np.concatenate(records[:5])), _source(records[5])


def _records(path: Path) -> np.ndarray:
    content = np.fromfile(path, np.uint8)
    if len(content) == 0 or len(content) % _N_BYTES:
        raise JaxdlError(f"{path} holds {len(content)} bytes, not a multiple of {_N_BYTES}: truncated; get it again.")
    return content.reshape(-1, _N_BYTES)


def _source(records: np.ndarray) -> ArraySource:
    label = records[:, 0].astype(np.int32)
    check_labels(label, 10)
    image = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ArraySource({"image": image, "label": label})
