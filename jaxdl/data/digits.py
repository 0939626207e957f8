"""The handwritten digits inside the package: a real data set with no download."""

from pathlib import Path

import numpy as np

from jaxdl.data.sources import ArraySource


def load_digits() -> tuple[ArraySource, ArraySource]:
    """1,797 images of handwritten digits, 8 x 8 grey, ten classes.

    The split is drawn by counting, with no random numbers: in file order, every fifth image *of each class* (the 5th,
    10th, ...) is in the test set. Both sets have the same shares of the classes, and no NumPy version can move a row.
    The file does not say who wrote a digit: the same hands wrote both sets, so the test accuracy speaks of new digits,
    not of new writers.

    Returns:
      `(train, test)` with 1,442 and 355 rows: "image" float32 (n, 8, 8, 1) in 0..1, "label" int32 (n,) in 0..9.

    Source: E. Alpaydin, C. Kaynak 1998, UCI Machine Learning Repository; see `digits.NOTICE`.

    Example:
      >>> train, test = load_digits()
      >>> len(train), len(test), train.arrays["image"].shape[1:]
      (1442, 355, (8, 8, 1))
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        image, label = file["image"], file["label"].astype(np.int32)
    source = ArraySource({"image": (image[..., None] / 16).astype(np.float32), "label": label})
    is_test = every_fifth(label)
    return source.select(~is_test), source.select(is_test)


def every_fifth(groups: np.ndarray) -> np.ndarray:
    """Marks the 5th, 10th, ... row of each group, in the order in which they stand.

    Args:
      groups: integers (n,): the class of each row, or zeros.

    Returns:
      bool (n,).

    Example:
      >>> np.flatnonzero(every_fifth(np.zeros(11, int))).tolist()
      [4, 9]
    """
    by_group = np.argsort(groups, kind="stable")
    _, first, group = np.unique(groups[by_group], return_index=True, return_inverse=True)
    is_fifth = np.empty(len(groups), bool)
    is_fifth[by_group] = (np.arange(len(groups)) - first[group]) % 5 == 4
    return is_fifth
