"""Image data for experiments: where it comes from and what is done to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxdl import JaxdlError, data

DIGITS = tuple(str(i) for i in range(10))
FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Images:
    """Which images, and how they are changed in training."""

    name: Literal["digits", "fashion_mnist", "cifar10", "tfds", "folder"] = "digits"  # the data set
    directory: str | None = None  # where its files are; the usual place of the data set where None
    tfds_name: str | None = None  # with name=tfds: a TensorFlow Datasets name, prepared as array_record
    test_directory: str | None = None  # with name=folder: the folder of the test images
    image_size: int | None = None  # with name=folder: the side in pixels that images are resized to
    classes: tuple[int, ...] = ()  # only rows of these classes, renumbered from 0 in this order; all where empty
    batch_size: int = 128  # rows of a global batch
    eval_batch_size: int = 500  # rows of an evaluation batch
    validation: float = 0.0  # share of the training rows held out to choose the best checkpoint by
    crop_padding: int = 0  # pixels of padding for random crops
    flip: bool = False  # mirror left and right at random
    rotate_degrees: float = 0.0  # largest random rotation
    cutout_size: int = 0  # side of a square set to the mean
    mixup_alpha: float = 0.0  # mixing of pairs of images and labels
    cutmix_alpha: float = 0.0  # pasting of a rectangle of another image

    def problems(self) -> Iterator[str]:
        counts = {"batch_size": self.batch_size, "eval_batch_size": self.eval_batch_size}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        amounts = ("crop_padding", "rotate_degrees", "cutout_size", "mixup_alpha", "cutmix_alpha")
        yield from (
            f"{name}={getattr(self, name)} must not be negative." for name in amounts if getattr(self, name) < 0
        )
        if not 0.0 <= self.validation < 1.0:
            yield f"validation={self.validation} must lie in [0, 1)."
        if self.classes and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            yield f"classes={self.classes} must be at least two different classes, or none to take all."
        if (self.name == "tfds") != (self.tfds_name is not None):
            yield "name='tfds' and tfds_name go together; give both or neither."
        if self.name == "folder" and not (self.directory and self.test_directory):
            yield "name='folder' needs directory and test_directory."
        if self.name == "cifar10" and self.directory is None:
            yield "name='cifar10' needs directory, the folder with data_batch_1.bin; or use name='tfds'."
        for name in ("directory", "test_directory"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_dir():
                yield f"{name}={value!r} is not a folder."


class ImageData(NamedTuple):
    """Standardised images, ready for training.

    Attributes:
      train: pipeline of augmented training batches.
      evaluated: name -> source of rows, `test` and, where one was held out, `validation`.
      class_names: one name a class.
      image_shape: (H, W, C).
      pictures: the test images as they were before standardisation.
    """

    train: data.Pipeline
    evaluated: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    pictures: Any


def load(settings: Images, seed: int) -> ImageData:
    """Loads, splits, standardises (by the training rows only) and augments.

    Raises:
      JaxdlError: a data set that is not there or not as it should be.
    """
    train, test, class_names = _sources(settings)
    if settings.classes:
        train, test = (_of_classes(source, settings.classes, class_names) for source in (train, test))
        class_names = tuple(class_names[i] for i in settings.classes)
    evaluated = {"test": test}
    if settings.validation:
        kept, held_out = data.split_rows(labels(train), settings.validation, seed)
        evaluated["validation"] = _select(train, held_out)
        train = _select(train, kept)
    standardize = data.fit_standardize(train)
    in_memory = isinstance(train, data.ArraySource)
    if in_memory:
        train = train.map(standardize)
        evaluated = {name: source.map(standardize) for name, source in evaluated.items()}
        data.check_labels(train.arrays["label"], len(class_names))
    else:
        evaluated = {name: _Mapped(source, standardize) for name, source in evaluated.items()}
    first = ([] if in_memory else [lambda example, rng: standardize(example)]) + _augmentations(settings)
    pipeline = data.Pipeline(
        train, settings.batch_size, seed, transforms=tuple(first), batch_transforms=_mixes(settings, len(class_names))
    )
    return ImageData(pipeline, evaluated, class_names, np.shape(train[0]["image"]), test)


def _sources(settings: Images) -> tuple[Any, Any, tuple[str, ...]]:
    if settings.name == "digits":
        return *data.load_digits(), DIGITS
    if settings.name == "fashion_mnist":
        return *data.load_fashion_mnist(settings.directory), FASHION
    if settings.name == "cifar10":
        return *data.load_cifar10(settings.directory or "."), data.CIFAR10_CLASSES
    train: Any
    test: Any
    if settings.name == "tfds":
        parts = [
            data.load_tfds(settings.tfds_name or "", part, data_dir=settings.directory) for part in ("train", "test")
        ]
        train, test = (part.in_memory() for part in parts)
        return train, test, parts[0].class_names
    size = None if settings.image_size is None else (settings.image_size, settings.image_size)
    train, test = (data.ImageFolder(path or "", size=size) for path in (settings.directory, settings.test_directory))
    if train.class_names != test.class_names:
        raise JaxdlError(
            f"the folders differ in classes, {train.class_names} and {test.class_names}; use the same names."
        )
    return train, test, train.class_names


def _select(source: Any, rows: np.ndarray) -> Any:
    return source.select(rows) if isinstance(source, data.ArraySource) else data.Subset(source, rows)


def labels(source: Any) -> np.ndarray:
    """The class of every row, (n,) int."""
    return np.array([source[row]["label"] for row in range(len(source))])


def _of_classes(source: Any, classes: tuple[int, ...], class_names: tuple[str, ...]) -> Any:
    unknown = [i for i in classes if not 0 <= i < len(class_names)]
    if unknown:
        raise JaxdlError(f"classes {unknown} are not there; the classes are 0 to {len(class_names) - 1}.")
    new_numbers = np.zeros(len(class_names), np.int32)
    new_numbers[list(classes)] = np.arange(len(classes))
    chosen = _select(source, np.flatnonzero(np.isin(labels(source), classes)))

    def renumber(example: dict[str, Any]) -> dict[str, Any]:
        return {**example, "label": new_numbers[example["label"]]}

    return chosen.map(renumber) if isinstance(chosen, data.ArraySource) else _Mapped(chosen, renumber)


class _Mapped:
    """A source whose rows go through a transform when they are read."""

    def __init__(self, source: Any, transform: Any) -> None:
        self._source, self._transform = source, transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._transform(self._source[row])


def _augmentations(settings: Images) -> list[Any]:
    chosen = [
        (settings.rotate_degrees, lambda: data.random_rotate(settings.rotate_degrees)),
        (settings.crop_padding, lambda: data.random_crop(settings.crop_padding)),
        (settings.flip, lambda: data.random_flip()),
        (settings.cutout_size, lambda: data.cutout(settings.cutout_size)),
    ]
    return [make() for is_on, make in chosen if is_on]


def _mixes(settings: Images, n_classes: int) -> tuple[Any, ...]:
    mixes = []
    if settings.mixup_alpha:
        mixes.append(data.mixup(settings.mixup_alpha, n_classes))
    if settings.cutmix_alpha:
        mixes.append(data.cutmix(settings.cutmix_alpha, n_classes))
    return tuple(mixes)
