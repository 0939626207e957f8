"""Named files of a folder or an archive, read as bytes: what corpora come in."""

import fnmatch
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from jaxdl.errors import JaxdlError

_ZIP, _TAR = (".zip", ".whl"), (".tar.gz", ".tgz", ".tar")


def read_members(path: str | Path, pattern: str, *, hint: str = "check the path.") -> dict[str, bytes]:
    """Reads the files whose path ends in a match of `pattern`, sorted by path.

    Args:
      path: a folder, a file, a zip archive (`.zip`, `.whl`) or a tar archive (`.tar.gz`, `.tgz`, `.tar`); a tar
        archive inside a tar archive is opened too.
      pattern: a glob, matched against the file's name, or against its whole path where it holds a `/`.
      hint: the remedy that the error names, such as how to get the corpus.

    Returns:
      path inside the folder or archive -> bytes; at least one.

    Raises:
      JaxdlError: nothing there, a damaged archive, or no file that matches.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> _ = (folder / "b.txt").write_bytes(b"two"), (folder / "a.txt").write_bytes(b"one")
      >>> read_members(folder, "*.txt")
      {'a.txt': b'one', 'b.txt': b'two'}
    """
    path = Path(path)
    if not path.exists():
        raise JaxdlError(f"{path} does not exist; {hint}")
    try:
        found = dict(_walk(path, pattern))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise JaxdlError(f"{path} is no readable archive ({error}); {hint}") from error
    except OSError as error:
        raise JaxdlError(f"{path} cannot be read ({error}); {hint}") from error
    if not found:
        raise JaxdlError(f"{path} holds no file {pattern!r}; {hint}")
    return dict(sorted(found.items()))


def _walk(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in path.rglob("*"):
            name = file.relative_to(path).as_posix()
            if file.is_file() and _fits(name, pattern):
                yield name, file.read_bytes()
    elif path.name.endswith(_ZIP):
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if _fits(name, pattern))
    elif path.name.endswith(_TAR):
        yield from _walk_tar(path.read_bytes(), pattern)
    elif _fits(path.name, pattern):
        yield path.name, path.read_bytes()


def _walk_tar(content: bytes, pattern: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            is_tar = member.name.endswith(_TAR)
            file = archive.extractfile(member) if is_tar or _fits(member.name, pattern) else None
            if file is not None and is_tar and not _fits(member.name, pattern):
                yield from _walk_tar(file.read(), pattern)
            elif file is not None:
                yield member.name, file.read()


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name if "/" in pattern else name.rsplit("/", 1)[-1], pattern)


def decode_utf8(content: bytes, name: str | Path) -> str:
    """Decodes a file's bytes; an error names the file and the place.

    Raises:
      JaxdlError: bytes that are not UTF-8.

    Example:
      >>> decode_utf8(b"caf\\xe9", "menu.txt")
      Traceback (most recent call last):
      jaxdl.errors.JaxdlError: menu.txt is not UTF-8: byte 0xe9 at offset 3; convert it, as with iconv -f latin1 -t \
utf-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JaxdlError(
            f"{name} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start};"
            " convert it, as with iconv -f latin1 -t utf-8."
        ) from None
