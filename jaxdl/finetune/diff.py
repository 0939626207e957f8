"""Which leaves of two models differ, and how far: runs, checkpoints, pretrained folders and deltas."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdl.checkpoint.manifest import LeafRecord
from jaxdl.finetune.sides import Side, as_params, is_scanned, open_side, taken_apart
from jaxdl.report.table import format_number

_BATCH_BYTES = 2**29  # of one side, held at a time


class Moved(NamedTuple):
    """A leaf of both sides whose bits differ.

    Attributes:
      path, shape, dtype: of the leaf; `old -> new` where the sides differ.
      max_abs: the largest absolute difference; None where shapes differ, or a delta knows the leaf by its hash only.
      relative: `|b - a| / |a|` in the L2 norm, in float64; infinite where a is zero.
    """

    path: str
    shape: str
    dtype: str
    max_abs: float | None
    relative: float | None


class Difference(NamedTuple):
    """What `compare` found; `str` gives the table.

    Attributes:
      a, b: the names of the sides.
      moved: leaves whose bits differ, the largest relative change first.
      identical: paths of the leaves that are equal bit for bit.
      only_a, only_b: leaves of one side, with shape and dtype where known.
    """

    a: str
    b: str
    moved: list[Moved]
    identical: list[str]
    only_a: list[str]
    only_b: list[str]

    @property
    def is_equal(self) -> bool:
        """Whether both sides hold the same leaves, bit for bit."""
        return not (self.moved or self.only_a or self.only_b)

    def __str__(self) -> str:
        return self.table()

    def table(self, max_rows: int | None = 40) -> str:
        """Lines for a reader; at most `max_rows` of the moved leaves, and of those on one side only."""
        shown = self.moved[:max_rows]
        rows = [("path", "shape", "dtype", "max abs", "relative"), *map(_cells, shown)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(n) if i > 2 else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = ["-" * len(lines[0])]
        more = [f"... {len(self.moved) - len(shown)} more"] if len(self.moved) > len(shown) else []
        counts = (
            f"{len(self.moved)} moved, {len(self.identical)} identical, {len(self.only_a)} only in a, "
            f"{len(self.only_b)} only in b"
        )
        listed = _listed("a", self.only_a, max_rows) + _listed("b", self.only_b, max_rows)
        body = [lines[0], *rule, *lines[1:], *more, *rule] if self.moved else []
        return "\n".join(line.rstrip() for line in [f"a: {self.a}", f"b: {self.b}", *body, *listed, counts])

    def to_json(self) -> str:
        """Everything as JSON; a number that is not finite is a string."""
        rows = [{name: _plain(value) for name, value in row._asdict().items()} for row in self.moved]
        content = {**self._asdict(), "moved": rows, "identical": len(self.identical), "is_equal": self.is_equal}
        return json.dumps(content, indent=1, allow_nan=False)


def _cells(row: Moved) -> tuple[str, ...]:
    numbers = ("?" if number is None else format_number(number) for number in (row.max_abs, row.relative))
    return (row.path, row.shape, row.dtype, *numbers)


def _listed(side: str, leaves: list[str], max_rows: int | None) -> list[str]:
    shown = leaves[:max_rows]
    more = [f"only in {side}: ... {len(leaves) - len(shown)} more"] if len(leaves) > len(shown) else []
    return [f"only in {side}: {leaf}" for leaf in shown] + more


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, on_note: Callable[[str], object] = print
) -> Difference:
    """Compares the parameters and the other collections (not the optimizers' states) of two models on disk.

    Leaves with equal hashes are not read. Where one side is a pretrained folder and the other is not, the folder is
    loaded with `pretrained.load`, in float32; where one side has its layers in one array, they are taken apart.

    Args:
      a, b: each a run folder or a folder of checkpoints (its newest intact step), a step folder, a delta, or a folder
        or file of safetensors.
      on_note: is told of damaged steps that are passed over.

    Raises:
      JaxdlError: a path is none of these, or it is damaged.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from jaxdl.pretrained import tensors
      >>> with tempfile.TemporaryDirectory() as name:
      ...     for folder, last in (("a", 4.0), ("b", 4.5)):
      ...         Path(name, folder).mkdir()
      ...         tensors.write_folder(Path(name, folder), {"same": np.ones(2), "w": np.array([3.0, last])})
      ...     print(str(compare(f"{name}/a", f"{name}/b")).replace(name, "."))
      a: pretrained ./a
      b: pretrained ./b
      path  shape  dtype    max abs  relative
      ---------------------------------------
      w     (2,)   float64      0.5       0.1
      ---------------------------------------
      1 moved, 1 identical, 0 only in a, 0 only in b
    """
    one, other = (open_side(path, on_note=on_note) for path in (a, b))
    if one.is_named_by_jaxdl != other.is_named_by_jaxdl:
        one, other = as_params(one, a), as_params(other, b)
    if is_scanned(one) != is_scanned(other):
        one, other = taken_apart(one), taken_apart(other)
    return _difference(one, other)


def _difference(a: Side, b: Side) -> Difference:
    known_a, known_b = _hashes(a), _hashes(b)
    both = [path for path in known_a if path in known_b]
    identical = [path for path in both if _agree(known_a[path], known_b[path])]
    unlike = [path for path in both if not _agree(known_a[path], known_b[path])]
    measurable = [p for p in unlike if p in a.records and p in b.records and a.records[p].shape == b.records[p].shape]
    distances = dict(_distances(a, b, measurable))
    moved = [
        Moved(path, *_described(a.records.get(path), b.records.get(path)), *distances.get(path, (None, None)))
        for path in unlike
    ]
    moved.sort(key=lambda row: (-_size(row), row.path))
    only_a, only_b = (
        [_labelled(x, p) for p in one if p not in other]
        for x, one, other in ((a, known_a, known_b), (b, known_b, known_a))
    )
    return Difference(a.name, b.name, moved, identical, only_a, only_b)


def _hashes(side: Side) -> dict[str, str]:
    return {**side.base, **{path: record.sha256 for path, record in side.records.items()}}


def _agree(a: str, b: str) -> bool:
    """Whether two hashes are one, of which a delta may know the first digits only."""
    return a.startswith(b) or b.startswith(a)


def _size(row: Moved) -> float:
    return math.inf if row.relative is None or math.isnan(row.relative) else row.relative


def _described(a: LeafRecord | None, b: LeafRecord | None) -> tuple[str, str]:
    known = [record for record in (a, b) if record is not None]
    shapes, dtypes = [str(record.shape) for record in known], [record.dtype for record in known]
    return tuple(" -> ".join(dict.fromkeys(texts)) or "?" for texts in (shapes, dtypes))  # type: ignore[return-value]


def _labelled(side: Side, path: str) -> str:
    return f"{path} {side.records[path]}" if path in side.records else f"{path} (in the base of the delta)"


def _distances(a: Side, b: Side, paths: Sequence[str]) -> Iterator[tuple[str, tuple[float, float]]]:
    for some in _batches(paths, a.records):
        values_a, values_b = a.read(some), b.read(some)
        for path in some:
            yield path, _distance(np.asarray(values_a[path]), np.asarray(values_b[path]))


def _batches(paths: Sequence[str], records: Mapping[str, LeafRecord]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for path in paths:
        n_bytes = 8 * math.prod(records[path].shape)
        if batch and size + n_bytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += n_bytes
    if batch:
        yield batch


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
    a, b = a.astype(wide), b.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        change, norm = float(np.linalg.norm(b - a)), float(np.linalg.norm(a))
        max_abs = float(np.max(np.abs(b - a), initial=0.0))
    return max_abs, change / norm if norm else (math.inf if change else 0.0)
