"""Random changes of single images, `(example, rng) -> example`, for `Pipeline(transforms=...)`.

Images are (H, W, C), uint8 in 0..255 or float in 0..1, and keep their dtype; standardise after augmenting.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdl.data.geometry import affine, rotation, shear, translation
from jaxdl.errors import JaxdlError

Example = dict[str, Any]
Augment = Callable[[Example, np.random.Generator], Example]
ImageFn = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _on(key: str, fn: ImageFn) -> Augment:
    def apply(example: Example, rng: np.random.Generator) -> Example:
        image = np.asarray(example[key])
        if image.ndim != 3:
            raise JaxdlError(f"{key} has shape {image.shape}; augmentation takes one image (H, W, C) at a time.")
        return {**example, key: fn(image, rng)}

    return apply


def random_crop(padding: int, *, key: str = "image") -> Augment:
    """Pads with zeros on all sides and cuts the original size out at a random place.

    Args:
      padding: pixels, at least 0; the image moves by up to this many each way.
      key: which array.

    Source: He et al. 2016, "Deep residual learning", section 4.2 (padding 4 for CIFAR-10).

    Example:
      >>> example = {"image": np.ones((4, 4, 1), np.float32)}
      >>> random_crop(2)(example, np.random.default_rng(0))["image"].shape
      (4, 4, 1)
    """
    _at_least_0(padding=padding)

    def crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left = rng.integers(0, 2 * padding + 1, size=2)
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        return padded[top : top + image.shape[0], left : left + image.shape[1]]

    return _on(key, crop)


def random_flip(probability: float = 0.5, *, key: str = "image") -> Augment:
    """Mirrors the image left to right. Not for digits or letters.

    Args:
      probability: of the mirror image, 0..1.
      key: which array.

    Example:
      >>> example = {"image": np.arange(3).reshape(1, 3, 1)}
      >>> random_flip(1.0)(example, np.random.default_rng(0))["image"].ravel().tolist()
      [2, 1, 0]
    """
    if not 0 <= probability <= 1:
        raise JaxdlError(f"probability={probability} must lie in 0..1.")
    return _on(key, lambda image, rng: image[:, ::-1] if rng.random() < probability else image)


def random_rotate(max_degrees: float, *, key: str = "image") -> Augment:
    """Rotates about the centre by a uniform angle, bilinear, with zeros outside.

    Args:
      max_degrees: the angle is uniform in -max_degrees .. max_degrees.
      key: which array.

    Example:
      >>> example = {"image": np.ones((5, 5, 1), np.float32)}
      >>> float(random_rotate(20)(example, np.random.default_rng(0))["image"][2, 2, 0])
      1.0
    """
    _at_least_0(max_degrees=max_degrees)
    return _on(key, lambda image, rng: affine(image, rotation(rng.uniform(-max_degrees, max_degrees))))


def cutout(size: int, *, key: str = "image") -> Augment:
    """Sets a random square to zero.

    The square lies wholly inside the image, so that exactly `size**2` pixels vanish; in the paper it may stick out.

    Args:
      size: side in pixels, at least 0 and at most that of the image.
      key: which array.

    Source: DeVries, Taylor 2017, "Improved regularization of CNNs with Cutout", arXiv:1708.04552.

    Example:
      >>> image = cutout(2)({"image": np.ones((4, 4, 1))}, np.random.default_rng(0))["image"]
      >>> int((image == 0).sum())
      4
    """
    _at_least_0(size=size)

    def cut(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if size > min(image.shape[:2]):
            raise JaxdlError(
                f"cutout size={size} does not fit an image of {image.shape[:2]} pixels; use a smaller one."
            )
        top, left = rng.integers(0, [image.shape[0] - size + 1, image.shape[1] - size + 1])
        image = image.copy()
        image[top : top + size, left : left + size] = 0
        return image

    return _on(key, cut)


def color_jitter(
    brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, *, key: str = "image"
) -> Augment:
    """Scales brightness, contrast (about the mean grey) and saturation (about each pixel's grey) by random factors.

    Args:
      brightness: the factor is uniform in 1 - brightness .. 1 + brightness; between 0 and 1.
      contrast: likewise.
      saturation: likewise; without effect on grey images.
      key: which array.

    Example:
      >>> example = {"image": np.full((2, 2, 3), 0.5)}
      >>> bool(color_jitter(0.0, 0.5, 0.5)(example, np.random.default_rng(0))["image"].std() == 0)
      True
    """
    given = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    problems = [f"{name}={value} must lie in 0..1." for name, value in given.items() if not 0 <= value <= 1]
    if problems:
        raise JaxdlError.listing("color_jitter", problems)

    def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        by = 1 + rng.uniform(-1, 1, size=3) * [brightness, contrast, saturation]
        light = _unit(image, key) * by[0]
        light = _blend(light, light.mean(), by[1])
        return _like(_blend(light, light.mean(axis=-1, keepdims=True), by[2]), image)

    return _on(key, jitter)


def rand_augment(n_ops: int = 2, magnitude: float = 0.3, *, key: str = "image") -> Augment:
    """Applies `n_ops` operations drawn at random from ten, each at one shared strength and with a random sign.

    The ten: identity, rotate (30 degrees at magnitude 1), shear x and y (0.3), translate x and y (0.45 of the side),
    brightness and contrast (factor 1 +- 0.9), solarize (inverts pixels above 1 - magnitude), posterize (8 bits down to
    4). The paper has fourteen.

    Args:
      n_ops: operations an image, drawn with replacement.
      magnitude: 0..1; the paper's scale of 30 divided by 30.
      key: which array.

    Source: Cubuk et al. 2020, "RandAugment", arXiv:1909.13719.

    Example:
      >>> example = {"image": np.zeros((8, 8, 3), np.uint8)}
      >>> rand_augment()(example, np.random.default_rng(0))["image"].dtype
      dtype('uint8')
    """
    _at_least_0(n_ops=n_ops, magnitude=magnitude)
    if magnitude > 1:
        raise JaxdlError(f"magnitude={magnitude} must lie in 0..1; divide the paper's number by 30.")

    def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        light = _unit(image, key)
        for op in rng.integers(0, len(_OPERATIONS), size=n_ops):
            light = np.clip(_OPERATIONS[op](light, magnitude, rng.choice([-1.0, 1.0])), 0, 1)
        return _like(light, image)

    return _on(key, augment)


_OPERATIONS: tuple[Callable[[np.ndarray, float, float], np.ndarray], ...] = (
    lambda image, m, sign: image,
    lambda image, m, sign: affine(image, rotation(sign * 30 * m)),
    lambda image, m, sign: affine(image, shear(x=sign * 0.3 * m)),
    lambda image, m, sign: affine(image, shear(y=sign * 0.3 * m)),
    lambda image, m, sign: affine(image, translation(x=sign * 0.45 * m * image.shape[1])),
    lambda image, m, sign: affine(image, translation(y=sign * 0.45 * m * image.shape[0])),
    lambda image, m, sign: image * (1 + sign * 0.9 * m),
    lambda image, m, sign: _blend(image, image.mean(), 1 + sign * 0.9 * m),
    lambda image, m, sign: np.where(image > 1 - m, 1 - image, image),
    lambda image, m, sign: np.floor(image * 255 / 2 ** round(4 * m)) * 2 ** round(4 * m) / 255,
)


def _blend(image: np.ndarray, centre: Any, by: float) -> np.ndarray:
    return centre + (image - centre) * by


def _unit(image: np.ndarray, key: str) -> np.ndarray:
    """float64 in 0..1."""
    if image.dtype == np.uint8:
        return image / 255
    if not np.issubdtype(image.dtype, np.floating) or image.min() < 0 or image.max() > 1:
        raise JaxdlError(
            f"{key} is {image.dtype} in {image.min():g}..{image.max():g}; colours are changed in uint8 images, or"
            " in float images in 0..1: standardise after augmenting."
        )
    return image.astype(np.float64)


def _like(light: np.ndarray, image: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.rint(light * 255).astype(np.uint8) if image.dtype == np.uint8 else light.astype(image.dtype)


def _at_least_0(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise JaxdlError(f"{name}={value} must be at least 0.")
