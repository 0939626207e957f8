"""Images in one folder a class."""

from pathlib import Path

import numpy as np

from jaxdl.data.sources import Example
from jaxdl.errors import JaxdlError

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageFolder:
    """The images under `path/<class>/`, read when they are asked for; labels number the class folders in sorted order.

    Files whose suffix is not that of an image are passed over; every sub-folder must hold an image.

    Args:
      path: the folder of class folders.
      size: (height, width) to resize to, bilinear; None keeps each image's own size.
      mode: "RGB" (3 channels) or "L" (grey, 1 channel).

    Attributes:
      class_names: the sub-folders, sorted; the label is the place in this tuple.
      paths: the files, sorted by class, then by name.

    Raises:
      JaxdlError: no folder, no class folders, a class without images; on reading, a broken image (names the file).

    Example:
      >>> source = ImageFolder("flowers/train", size=(64, 64))  # doctest: +SKIP
      >>> source.class_names, source[0]["image"].shape  # doctest: +SKIP
      (('daisy', 'rose'), (64, 64, 3))
    """

    def __init__(self, path: str | Path, *, size: tuple[int, int] | None = None, mode: str = "RGB") -> None:
        if mode not in ("RGB", "L"):
            raise JaxdlError(f"mode={mode!r} must be 'RGB' or 'L'.")
        folders = _class_folders(Path(path))
        files = {folder: _images(folder) for folder in folders}
        empty = [folder.name for folder, images in files.items() if not images]
        if empty:
            raise JaxdlError(f"no images in {', '.join(empty)} under {path}; add some or remove the folder.")
        self.class_names = tuple(folder.name for folder in folders)
        self.paths = tuple(image for images in files.values() for image in images)
        self.labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(images) for images in files.values()])
        self._size, self._mode = size, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Example:
        """{"image": uint8 (H, W, C), "label": int32 ()}."""
        return {"image": self._image(self.paths[row]), "label": self.labels[row]}

    def _image(self, path: Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(path) as file:
                image: Image.Image = file.convert(self._mode)
        except (OSError, SyntaxError, ValueError) as error:
            raise JaxdlError(f"{path} is no readable image ({error}); repair or remove it.") from error
        if self._size is not None:
            image = image.resize((self._size[1], self._size[0]), Image.Resampling.BILINEAR)
        pixels = np.array(image, np.uint8)
        return pixels if pixels.ndim == 3 else pixels[..., None]


def _class_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise JaxdlError(f"{path} is not a folder; give the folder that holds one sub-folder a class.")
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not folders:
        raise JaxdlError(f"{path} holds no sub-folders; put the images of each class in a sub-folder of its name.")
    return folders


def _images(folder: Path) -> list[Path]:
    files = (child for child in folder.iterdir() if child.suffix.lower() in _SUFFIXES and child.is_file())
    return sorted(child for child in files if not child.name.startswith("."))
