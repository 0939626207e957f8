"""Random changes of images, for `Pipeline(transforms=...)`: of one, or of many at once.

Images are (H, W, C), uint8 in 0..255 or float in 0..1, and keep their dtype; standardise after augmenting. Each row
draws from a generator of its own, so that an image is changed in the same way alone and among others, bit for bit.

Dimensions: `N` rows, `H` height, `W` width, `C` channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxdl.data.geometry import affine, rotation, shear, translation
from jaxdl.errors import JaxdlError

Example = dict[str, Any]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]
Change = Callable[[np.ndarray, np.ndarray], np.ndarray]
_AT_A_TIME = 2**15  # numbers of images, which a core's cache holds with what is made of them


@dataclass(frozen=True)
class Augment:
    """A random change of images, made by the functions of this module.

    Attributes:
      key: which array.
      draw: (generator, shape of an image) -> the random numbers of one image, always as many.
      change: (images (N, H, W, C), their random numbers (N, ...)) -> images of the same shape and dtype.
    """

    key: str
    draw: Draw
    change: Change
    is_batched: ClassVar[bool] = True

    def __call__(
        self, example: dict[str, Any], rng: np.random.Generator | Sequence[np.random.Generator]
    ) -> dict[str, Any]:
        """Changes an example by its generator, or rows by a list of theirs.

        Raises:
          JaxdlError: what is there is no image (H, W, C), or no rows of them, or not as many as generators.

        Example:
          >>> rows, rngs = {"image": np.ones((2, 4, 4, 1))}, [np.random.default_rng(i) for i in (0, 1)]
          >>> random_crop(2)(rows, rngs)["image"].shape
          (2, 4, 4, 1)
        """
        images = np.asarray(example[self.key])
        rngs = [rng] if isinstance(rng, np.random.Generator) else rng
        is_one = rngs is not rng
        if images.ndim != (3 if is_one else 4) or not (is_one or len(images) == len(rngs)):
            given = "one generator" if is_one else f"a list of {len(rngs)} generators"
            raise JaxdlError(
                f"{self.key} has shape {images.shape}, with {given}; augmentation takes one image (H, W, C) and its"
                " generator, or rows (N, H, W, C) and a list of N generators."
            )
        changed = self._changed(images[None], rngs)[0] if is_one else self._changed(images, rngs)
        return {**example, self.key: changed}

    def _changed(self, images: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        drawn = np.array([self.draw(rng, images.shape[1:]) for rng in rngs])
        size = max(1, _AT_A_TIME // max(1, images[0].size))
        parts = [slice(i, i + size) for i in range(0, len(images), size)]
        return np.concatenate([self.change(images[part], drawn[part]) for part in parts])


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

    def crop(images: np.ndarray, corners: np.ndarray) -> np.ndarray:
        height, width = images.shape[1:3]
        padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        places = zip(padded, corners.tolist(), strict=True)
        return np.stack([image[top : top + height, left : left + width] for image, (top, left) in places])

    return Augment(key, lambda rng, shape: rng.integers(0, 2 * padding + 1, size=2), crop)


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

    def flip(images: np.ndarray, is_flipped: np.ndarray) -> np.ndarray:
        images = images.copy()
        images[is_flipped] = images[is_flipped].take(np.arange(images.shape[2])[::-1], axis=2)
        return images

    return Augment(key, lambda rng, shape: rng.random() < probability, flip)


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
    return Augment(
        key,
        lambda rng, shape: rng.uniform(-max_degrees, max_degrees),
        lambda images, degrees: affine(images, rotation(degrees)),
    )


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

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if size > min(shape[:2]):
            raise JaxdlError(f"cutout size={size} does not fit an image of {shape[:2]} pixels; use a smaller one.")
        return rng.integers(0, [shape[0] - size + 1, shape[1] - size + 1])

    def cut(images: np.ndarray, corners: np.ndarray) -> np.ndarray:
        images = images.copy()
        for image, (top, left) in zip(images, corners.tolist(), strict=True):
            image[top : top + size, left : left + size] = 0
        return images

    return Augment(key, draw, cut)


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

    def jitter(images: np.ndarray, by: np.ndarray) -> np.ndarray:
        light = _unit(images, key) * _each(by[:, 0])
        light = _blend(light, _means(light), _each(by[:, 1]))
        return _like(_blend(light, light.mean(axis=-1, keepdims=True), _each(by[:, 2])), images)

    return Augment(key, lambda rng, shape: 1 + rng.uniform(-1, 1, size=3) * [brightness, contrast, saturation], jitter)


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

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
        return [rng.integers(0, len(_OPERATIONS), size=n_ops), rng.integers(0, 2, size=n_ops) * 2 - 1]

    def augment(images: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        light = _unit(images, key)
        for ops, signs in drawn.transpose(2, 1, 0):
            for op in np.unique(ops):
                at = ops == op
                light[at] = np.clip(_OPERATIONS[op](light[at], magnitude, signs[at]), 0, 1)
        return _like(light, images)

    return Augment(key, draw, augment)


# (images (N, H, W, C), magnitude, signs (N,)) -> images
_OPERATIONS: tuple[Callable[[np.ndarray, float, np.ndarray], np.ndarray], ...] = (
    lambda images, m, signs: images,
    lambda images, m, signs: affine(images, rotation(signs * 30 * m)),
    lambda images, m, signs: affine(images, shear(x=signs * 0.3 * m)),
    lambda images, m, signs: affine(images, shear(y=signs * 0.3 * m)),
    lambda images, m, signs: affine(images, translation(x=signs * 0.45 * m * images.shape[2])),
    lambda images, m, signs: affine(images, translation(y=signs * 0.45 * m * images.shape[1])),
    lambda images, m, signs: images * (1 + _each(signs) * 0.9 * m),
    lambda images, m, signs: _blend(images, _means(images), 1 + _each(signs) * 0.9 * m),
    lambda images, m, signs: np.where(images > 1 - m, 1 - images, images),
    lambda images, m, signs: np.floor(images * 255 / 2 ** round(4 * m)) * 2 ** round(4 * m) / 255,
)


def _each(numbers: np.ndarray) -> np.ndarray:
    """(N,) -> (N, 1, 1, 1), for images (N, H, W, C)."""
    return numbers[:, None, None, None]


def _means(images: np.ndarray) -> np.ndarray:
    """Of each image, (N, 1, 1, 1)."""
    return _each(images.reshape(len(images), -1).mean(axis=1))


def _blend(image: np.ndarray, centre: Any, by: Any) -> np.ndarray:
    return centre + (image - centre) * by


def _unit(image: np.ndarray, key: str) -> np.ndarray:
    """float64 in 0..1, a copy."""
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
