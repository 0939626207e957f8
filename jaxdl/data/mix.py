"""Mixing the rows of a batch: mixup and CutMix, `(batch, rng) -> batch`, for `Pipeline(batch_transforms=...)`.

Labels become shares, float32 (B, C), which a cross entropy over soft labels takes as they are.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdl.data.splits import check_labels
from jaxdl.errors import JaxdlError

Batch = dict[str, Any]
Mix = Callable[[Batch, np.random.Generator], Batch]


def mixup(alpha: float, n_classes: int, *, image_key: str = "image", label_key: str = "label") -> Mix:
    """Replaces each row by `share * row + (1 - share) * other`, where the others are a permutation of the batch.

    One share a batch, drawn from Beta(alpha, alpha). Images become float32.

    Args:
      alpha: greater than 0; 0.1 to 0.4 in the paper (ImageNet), 1 for CIFAR-10. Smaller mixes less.
      n_classes: C.
      image_key: float or uint8 (B, ...).
      label_key: integers (B,), or shares (B, C) of an earlier mix.

    Raises:
      JaxdlError: alpha or labels out of range; a batch with padding rows.

    Source: Zhang et al. 2018, "mixup: beyond empirical risk minimization", arXiv:1710.09412.

    Example:
      >>> batch = {"image": np.zeros((2, 4, 4, 1)), "label": np.array([0, 1])}
      >>> mixup(0.2, 2)(batch, np.random.default_rng(0))["label"].sum(axis=1).tolist()
      [1.0, 1.0]
    """
    _check_alpha(alpha)

    def apply(batch: Batch, rng: np.random.Generator) -> Batch:
        image, label = np.asarray(batch[image_key], np.float32), _shares(batch, label_key, n_classes)
        share, other = np.float32(rng.beta(alpha, alpha)), rng.permutation(len(image))
        mixed = share * image + (1 - share) * image[other]
        return {**batch, image_key: mixed, label_key: share * label + (1 - share) * label[other]}

    return apply


def cutmix(alpha: float, n_classes: int, *, image_key: str = "image", label_key: str = "label") -> Mix:
    """Pastes one box of another image into each image; labels are shared out by area.

    One box a batch: its area is about `1 - share` of the image with share from Beta(alpha, alpha), its centre uniform.
    What sticks out is cut off, and the labels take the exact share of pixels that is left.

    Args:
      alpha: greater than 0; 1 in the paper.
      n_classes: C.
      image_key: (B, H, W, C), any dtype, which is kept.
      label_key: integers (B,), or shares (B, C) of an earlier mix.

    Raises:
      JaxdlError: alpha or labels out of range; a batch with padding rows.

    Source: Yun et al. 2019, "CutMix", arXiv:1905.04899, appendix A.

    Example:
      >>> batch = {"image": np.zeros((2, 4, 4, 1)), "label": np.array([0, 1])}
      >>> cutmix(1.0, 2)(batch, np.random.default_rng(0))["label"].sum(axis=1).tolist()
      [1.0, 1.0]
    """
    _check_alpha(alpha)

    def apply(batch: Batch, rng: np.random.Generator) -> Batch:
        image, label = np.asarray(batch[image_key]).copy(), _shares(batch, label_key, n_classes)
        height, width = image.shape[1:3]
        side, other = np.sqrt(1 - rng.beta(alpha, alpha)), rng.permutation(len(image))
        rows, columns = _interval(height, side, rng), _interval(width, side, rng)
        image[:, rows, columns] = image[other][:, rows, columns]
        n_pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
        share = np.float32(1 - n_pasted / (height * width))
        return {**batch, image_key: image, label_key: share * label + (1 - share) * label[other]}

    return apply


def _interval(length: int, share: float, rng: np.random.Generator) -> slice:
    n_pixels, centre = int(length * share), int(rng.integers(0, length))
    return slice(max(centre - n_pixels // 2, 0), min(centre - n_pixels // 2 + n_pixels, length))


def _shares(batch: Batch, key: str, n_classes: int) -> np.ndarray:
    if "weight" in batch and (np.asarray(batch["weight"]) == 0).any():
        raise JaxdlError(
            "the batch holds padding rows (weight 0), which must not be mixed into others; mix in training only."
        )
    label = np.asarray(batch[key])
    if label.ndim == 2 and label.shape[1] == n_classes:
        return label.astype(np.float32)
    check_labels(label, n_classes)
    return np.eye(n_classes, dtype=np.float32)[label]


def _check_alpha(alpha: float) -> None:
    if not alpha > 0:
        raise JaxdlError(f"alpha={alpha} must be greater than 0; leave the transform out for no mixing.")
