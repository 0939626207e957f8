"""Sources of documents, `len(source)` and `source[row] -> {"text": str, ...}`, and whole files as documents."""

import hashlib
import platform
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data.sources import Arrays, Example
from jaxdl.data.text.archives import decode_utf8, read_members
from jaxdl.errors import JaxdlError

_OUTSIDE = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


class Documents:
    """Documents in memory: a column of texts, and further columns of one entry each.

    Args:
      columns: name -> one entry a document; "text" is the one that tokenizers read.
      class_names: the names of the values of the column "label"; empty if it has none.
      about: what a figure should be told with: where the texts come from, their hash, a version.

    Raises:
      JaxdlError: no column, no document, or columns of different lengths.

    Example:
      >>> documents = Documents({"text": ["one", "two"], "label": [0, 1]}, class_names=("no", "yes"))
      >>> len(documents), documents[1]
      (2, {'text': 'two', 'label': 1})
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        *,
        class_names: Sequence[str] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.columns = dict(columns)
        self.class_names, self.about = tuple(class_names), dict(about or {})
        lengths = {name: len(values) for name, values in self.columns.items()}
        if not lengths or 0 in lengths.values():
            raise JaxdlError("there are no documents; an empty corpus cannot be read.")
        if len(set(lengths.values())) > 1:
            raise JaxdlError(f"the columns differ in length: {lengths}; give one entry a document.")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> Example:
        return {name: values[row] for name, values in self.columns.items()}

    def __repr__(self) -> str:
        return f"Documents({len(self)} rows: {', '.join(self.columns)})"

    def select(self, rows: np.ndarray) -> "Documents":
        """A new source with these documents, in this order.

        Args:
          rows: row ids (k,), or a bool mask (n,).

        Raises:
          JaxdlError: no document is selected.

        Example:
          >>> Documents({"text": ["a", "b", "c"]}).select(np.array([2, 0])).columns["text"]
          ['c', 'a']
        """
        rows = np.arange(len(self))[np.asarray(rows)]
        chosen = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Documents(chosen, class_names=self.class_names, about=self.about)

    def take(self, rows: np.ndarray) -> Arrays:
        """The columns of some rows as arrays; text becomes an object array.

        Example:
          >>> Documents({"text": ["a", "b"]}).take(np.array([1]))["text"].tolist()
          ['b']
        """
        return {name: _array([values[row] for row in rows]) for name, values in self.columns.items()}

    def sha256(self) -> str:
        """The hash of the texts, one after the other: what a figure was measured on.

        Example:
          >>> Documents({"text": ["a", "b"]}).sha256()[:8]
          'fb8e20fc'
        """
        digest = hashlib.sha256()
        for text in self.columns["text"]:
            digest.update(text.encode())
        return digest.hexdigest()


def _array(values: list[Any]) -> np.ndarray:
    if isinstance(values[0], (int, float, np.generic, np.ndarray)):
        return np.asarray(values)
    array = np.empty(len(values), object)
    array[:] = values
    return array


def read_text_files(path: str | Path, pattern: str = "*.txt") -> Documents:
    """Reads text files, one document a file, sorted by path; files of nothing but white space are passed over.

    Args:
      path: a file, a folder (searched through all its sub-folders), or a zip or tar archive.
      pattern: a glob for the file names of a folder or archive.

    Returns:
      "text" and "path".

    Raises:
      JaxdlError: no such path, no file that fits, or one that is not UTF-8 (names it and the offset).

    Example:
      >>> read_text_files(Path(__file__).parent, "docu*.py")[0]["path"]
      'documents.py'
    """
    files = read_members(path, Path(path).name if Path(path).is_file() and _is_plain(Path(path)) else pattern)
    return _documents({name: decode_utf8(content, name) for name, content in files.items()}, path)


def _is_plain(path: Path) -> bool:
    return not path.name.endswith((".zip", ".whl", ".tar", ".tgz", ".tar.gz"))


def _documents(files: Mapping[str, str], path: Any, **about: Any) -> Documents:
    kept = {name: text for name, text in files.items() if text.strip()}
    if not kept:
        raise JaxdlError(f"{path} holds empty files only; an empty corpus cannot be read.")
    documents = Documents({"text": list(kept.values()), "path": list(kept)}, about=about)
    documents.about |= {"n_files": len(kept), "sha256": documents.sha256()}
    return documents


def python_library(root: str | Path | None = None) -> Documents:
    """The source of Python's own standard library: about 12 MB of text that is on every machine.

    Every `.py` file but those in tests and installed packages, sorted by path. A test release of Python or a
    distribution's patches change it: tell a figure with `about`, which holds the version and the hash.

    Args:
      root: the folder of the library; None is that of the running Python.

    Returns:
      "text" and "path"; `about` has `python`, `n_files` and `sha256`.

    Raises:
      JaxdlError: the folder holds no source (some distributions ship bytecode only).

    Example:
      >>> library = python_library()
      >>> "import" in library[0]["text"], library.about["python"] == platform.python_version()
      (True, True)
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files = {}
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        name = file.relative_to(root).as_posix()
        if not any(part in _OUTSIDE or part.startswith("config-") for part in name.split("/")[:-1]):
            files[name] = decode_utf8(file.read_bytes(), file)
    if not files:
        raise JaxdlError(f"{root} holds no .py file; give the folder of another Python's library (lib/python3.x).")
    return _documents(files, root, python=platform.python_version())


def split_by_hash(documents: Documents, fraction: float, seed: int = 0) -> tuple[Documents, Documents]:
    """Holds out whole files by the hash of their path, so that a file stays on its side when others come or go.

    Args:
      documents: with a column "path".
      fraction: the expected share of held-out files, 0 < fraction < 1.
      seed: another seed draws other files.

    Returns:
      `(kept, held_out)`.

    Raises:
      JaxdlError: a fraction out of range, or a side that is empty.

    Example:
      >>> documents = Documents({"text": ["x"] * 100, "path": [str(i) for i in range(100)]})
      >>> [len(part) for part in split_by_hash(documents, 0.2)]
      [83, 17]
    """
    if not 0 < fraction < 1:
        raise JaxdlError(f"fraction={fraction} must be greater than 0 and less than 1: the share of held-out files.")
    draws = [hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8] for path in documents.columns["path"]]
    is_held_out = np.array([int.from_bytes(draw, "big") < fraction * 2**64 for draw in draws])
    if is_held_out.all() or not is_held_out.any():
        raise JaxdlError(
            f"fraction={fraction} of {len(documents)} files leaves one side empty; take another fraction, seed, or more"
            " files (a single file can be cut by lines first)."
        )
    return documents.select(~is_held_out), documents.select(is_held_out)
