"""TensorFlow Datasets without TensorFlow: prepared data sets are read through `as_data_source`."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxdl.data.sources import ArraySource, Example, stack
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest

T = TypeVar("T")


class TfdsSource:
    """A TFDS `data_source` as a source: integers become int32 (where they fit), floats float32;
    images stay uint8, text stays bytes.

    Args:
      data_source: the result of `tfds.data_source` or `builder.as_data_source`.
      class_names: the names of the classes of "label"; empty if it has none.

    Example:
      >>> source = TfdsSource([{"label": 3, "image": np.zeros((2, 2, 1), np.uint8)}])
      >>> source[0]["label"].dtype, source[0]["image"].dtype
      (dtype('int32'), dtype('uint8'))
    """

    def __init__(self, data_source: Any, class_names: tuple[str, ...] = ()) -> None:
        self._data_source, self.class_names = data_source, class_names

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, row: int) -> Example:
        return {key: _narrow(value) for key, value in self._data_source[row].items()}

    def in_memory(self) -> ArraySource:
        """Reads every row now; from then on batches are gathered in one go. Needs the memory of the whole split."""
        return ArraySource(stack([self[row] for row in range(len(self))]))


def _narrow(value: Any) -> Any:
    array = np.asarray(value) if isinstance(value, (bool, int, float, np.generic, np.ndarray)) else value
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == np.int64 and np.abs(array).max(initial=0) < 2**31:
        return array.astype(np.int32)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def load_tfds(name: str, split: str, *, data_dir: str | Path | None = None, timeout_s: float = 10) -> TfdsSource:
    """Opens a split of a TFDS data set that is prepared on this machine. Never downloads and never imports TensorFlow.

    Args:
      name: as in TFDS: "mnist", "fashion_mnist", "cifar10", "my_set/config:1.0.0".
      split: as in TFDS: "train", "test", "train[:80%]".
      data_dir: the folder that holds the folders of data sets; None is that of TFDS (`~/tensorflow_datasets`, or
        TFDS_DATA_DIR).
      timeout_s: seconds after which a data folder that does not answer is given up.

    Returns:
      A source of the set's own features: for the three above "image" uint8 (H, W, C) and "label" int32 ().

    Raises:
      JaxdlError: an unknown name (with the nearest ones), an unknown split (with the real ones), a set that is not
        prepared here in a random-access format (says how and where), or a folder that does not answer.

    Source: https://www.tensorflow.org/datasets/data_source

    Example:
      >>> train = load_tfds("mnist", "train")  # doctest: +SKIP
      >>> train[0]["image"].shape  # doctest: +SKIP
      (28, 28, 1)
    """
    return _within(timeout_s, lambda: _open(name, split, data_dir), f"tfds data set {name!r} in {data_dir or 'TFDS'}")


def _open(name: str, split: str, data_dir: str | Path | None) -> TfdsSource:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        near = ", ".join(nearest(name, tfds.list_builders(with_community_datasets=False)))
        raise JaxdlError(f"TFDS knows no data set {name!r}; nearest names: {near}.") from error
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise JaxdlError(f"TFDS cannot open {name!r}: {error}") from error
    try:
        features = builder.info.features
        names = getattr(features["label"], "names", ()) if features and "label" in features else ()
        return TfdsSource(builder.as_data_source(split=split), tuple(names))
    except (NotImplementedError, AssertionError, ValueError, OSError, KeyError) as error:
        raise _explained(builder, name, split, error) from error


def _explained(builder: Any, name: str, split: str, error: Exception) -> JaxdlError:
    splits = list(builder.info.splits)
    if not splits or isinstance(error, (NotImplementedError, FileNotFoundError)):
        return JaxdlError(
            f"{name!r} is not prepared in a random-access format under {builder.data_path}. On a machine with a network"
            f" run `pip install tensorflow tensorflow-datasets`, then `tfds build {builder.name}"
            f" --file_format=array_record`, and copy the folder {builder.data_path.name} to {builder.data_path};"
            " jaxdl itself downloads nothing."
        )
    return JaxdlError(f"split {split!r} of {name!r} cannot be read ({error}); its splits are {', '.join(splits)}.")


def _within(timeout_s: float, fn: Callable[[], T], what: str) -> T:
    """Runs `fn` in a daemon thread, so that a dead network folder is an error and not a hang."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(fn())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="jaxdl-tfds", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise JaxdlError(
            f"{what} did not answer within timeout_s={timeout_s}; is the folder on a network that cannot be reached?"
            " Copy the prepared data set to a local folder and name it with data_dir=."
        )
    return results[0]
