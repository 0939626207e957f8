"""The folder of a profile: one of its own, so that no run and nothing of the user's is overwritten."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxdl.errors import JaxdlError

_MARK = ".jaxdl-profile"


@contextlib.contextmanager
def trace_folder(folder: str | Path | None) -> Iterator[Path]:
    """An empty folder for a trace: a profile that lies there is replaced; None is a temporary one.

    Raises:
      JaxdlError: it holds something else, or cannot be written.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="jaxdl-profile-") as made:
            yield Path(made)
        return
    yield claim_folder(Path(folder))


def claim_folder(folder: Path) -> Path:
    """Makes a folder for a profile, or empties that of an earlier one.

    Raises:
      JaxdlError: as for `trace_folder`.
    """
    if folder.exists() and not folder.is_dir():
        raise JaxdlError(f"{folder} is a file; a profile needs a folder. Choose another, or remove it.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise JaxdlError(f"{folder} exists and is no profile: it has no {_MARK}. Choose another folder, or remove it.")
    try:
        shutil.rmtree(folder / "plugins", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
    except OSError as error:
        raise JaxdlError(f"the folder {folder} cannot be written: {error.strerror}; choose another.") from None
    return folder
