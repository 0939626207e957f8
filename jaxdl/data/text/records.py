"""Documents out of records: JSON lines, Parquet, TFDS, any source."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdl.data.sources import Source
from jaxdl.data.text.archives import decode_utf8, read_members
from jaxdl.data.text.documents import Documents
from jaxdl.data.tfds import load_tfds
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest


def read_jsonl(path: str | Path, *, text: str = "text", keep: Sequence[str] = ()) -> Documents:
    """Reads a file of one JSON object a line.

    Args:
      path: the file.
      text: the field of the text.
      keep: further fields to keep, such as "label".

    Raises:
      JaxdlError: no such file, a line that is no JSON object (names it), or a missing field (with the nearest).

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
      >>> _ = path.write_text('{"body": "one", "label": 1}\\n')
      >>> read_jsonl(path, text="body", keep=["label"])[0]
      {'text': 'one', 'label': 1}
    """
    path = Path(path)
    content = decode_utf8(next(iter(read_members(path, path.name).values())), path)
    rows = [_parsed(line, path, i) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    _check_fields(path, [text, *keep], rows)
    return Documents({"text": [row[text] for row in rows], **{name: [row[name] for row in rows] for name in keep}})


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise JaxdlError(f"{path} line {number} is not JSON ({error.msg} at column {error.colno}); mend it.") from None
    if not isinstance(row, dict):
        raise JaxdlError(f"{path} line {number} is {type(row).__name__}, not an object; write one {{...}} a line.")
    return row


def _check_fields(path: Path, wanted: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    problems = []
    for name in wanted:
        lacking = next((i for i, row in enumerate(rows, 1) if name not in row), None)
        if lacking is not None:
            near = ", ".join(nearest(name, rows[lacking - 1])) or "there are none"
            problems.append(f"object {lacking} has no field {name!r}; nearest: {near}.")
    if not problems and any(not isinstance(row[wanted[0]], str) for row in rows):
        problems.append(f"the field {wanted[0]!r} is not text in every object; name another field or drop those.")
    if problems:
        raise JaxdlError.listing(str(path), problems)


def read_parquet(path: str | Path, *, text: str = "text", keep: Sequence[str] = ()) -> Documents:
    """Reads columns of a Parquet file; arguments as for `read_jsonl`.

    Example:
      >>> read_parquet("reviews.parquet", text="review", keep=["label"])  # doctest: +SKIP
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise JaxdlError(f"{path} does not exist; check the path.") from None
    except pa.ArrowInvalid as error:
        raise JaxdlError(f"{path} cannot be read as a Parquet file: {error}") from error
    _check_fields(Path(path), [text, *keep], [dict.fromkeys(file.schema_arrow.names, "")])
    table = file.read(columns=[text, *keep])
    texts = table.column(text).to_pylist()
    if not all(isinstance(value, str) for value in texts):
        raise JaxdlError(f"{path}: the column {text!r} is not text in every row; name another column, or drop rows.")
    return Documents({"text": texts, **{name: table.column(name).to_pylist() for name in keep}})


def read_tfds(name: str, split: str, *, text: str = "text", data_dir: str | Path | None = None) -> Documents:
    """Reads the texts and labels of a prepared TFDS data set (see `jaxdl.data.load_tfds`).

    Args:
      name, split, data_dir: as for `load_tfds`.
      text: the feature of the text.

    Raises:
      JaxdlError: as `load_tfds`; or a missing feature.

    Example:
      >>> read_tfds("imdb_reviews", "train")[0]["label"]  # doctest: +SKIP
      0
    """
    return from_source(load_tfds(name, split, data_dir=data_dir), text=text)


def from_source(source: Source, *, text: str = "text") -> Documents:
    """Reads every row of any source with a text (str or UTF-8 bytes); its "label", where it has one, is kept.

    Example:
      >>> from_source([{"review": b"fine", "label": 1}], text="review")[0]
      {'text': 'fine', 'label': 1}
    """
    rows = [source[row] for row in range(len(source))]
    if rows and text not in rows[0]:
        raise JaxdlError(f"the source has no key {text!r}; nearest: {', '.join(nearest(text, rows[0]))}.")
    values = [row[text] for row in rows]
    texts = [decode_utf8(v, f"row {i}") if isinstance(v, bytes) else v for i, v in enumerate(values)]
    labels = {"label": [int(row["label"]) for row in rows]} if rows and "label" in rows[0] else {}
    return Documents({"text": texts, **labels}, class_names=getattr(source, "class_names", ()))
