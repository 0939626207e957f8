"""Which base an adapter was made for: a hash of every leaf, in a file of its own beside PEFT's."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.checkpoint.manifest import hash_array
from jaxdl.paths import Tree, flatten
from jaxdl.pretrained.ledger import PretrainedError, shortened

BASE = "jaxdl_base.json"


def unrolled_leaves(params: Tree) -> Iterator[tuple[str, Any]]:
    """The leaves by the paths of the unrolled layout; of scanned layers one slice at a time.

    Example:
      >>> [(path, int(leaf)) for path, leaf in unrolled_leaves({"encoder": {"layers": {"w": np.array([3, 4])}}})]
      [('encoder/layer_0/w', 3), ('encoder/layer_1/w', 4)]
    """
    for path, leaf in flatten(params).items():
        parts = path.split("/")
        if "layers" not in parts:
            yield path, leaf
            continue
        k = parts.index("layers")
        yield from (("/".join([*parts[:k], f"layer_{i}", *parts[k + 1 :]]), leaf[i]) for i in range(len(leaf)))


def own_path(path: str, known: Collection[str]) -> str:
    """The path in a model's own layout of a leaf of the unrolled one; itself, or that of the stacked layers.

    Example:
      >>> own_path("encoder/layer_1/w", ["encoder/layers/w"]), own_path("head/w", ["head/w"])
      ('encoder/layers/w', 'head/w')
    """
    if path in known:
        return path
    stacked = "/".join("layers" if is_layer(part) else part for part in path.split("/"))
    return stacked if stacked in known else path


def is_layer(part: str) -> bool:
    """Whether a part of a path is that of a numbered layer.

    Example:
      >>> is_layer("layer_3"), is_layer("layer_norm")
      (True, False)
    """
    return part.startswith("layer_") and part.removeprefix("layer_").isdigit()


def layer_of(path: str) -> int:
    """The number of the layer that a leaf of the unrolled layout is in, -1 outside of layers.

    Example:
      >>> layer_of("encoder/layer_10/w"), layer_of("head/w")
      (10, -1)
    """
    return next((int(part.removeprefix("layer_")) for part in path.split("/") if is_layer(part)), -1)


def base_record(base: Tree, without: Collection[str]) -> dict[str, list[str]]:
    """`{path: [dtype and shape, sha256]}` of the leaves of a base, in the unrolled layout.

    Args:
      base: parameters without adapters; quantised leaves count as their codes.
      without: paths to leave out, because the adapter holds them itself.

    Example:
      >>> record = base_record({"head": {"bias": np.zeros(2)}}, ())
      >>> record["head/bias"][0], len(record["head/bias"][1])
      ('float64[2]', 64)
    """
    record = {}
    for path, leaf in unrolled_leaves(base):
        if path not in without:
            x = np.asarray(leaf, order="C")
            record[path] = [f"{x.dtype.name}{list(x.shape)}", hash_array(x)]
    return dict(sorted(record.items()))


def base_problems(folder: Path, base: Tree) -> list[str]:
    """Why an adapter was made for another base; empty where it was not, or where the folder does not tell.

    Only leaves of the same dtype and shape are compared: a base may be cast or quantised.

    Args:
      folder: of the adapter.
      base: parameters without adapters.

    Raises:
      PretrainedError: the record is damaged.
    """
    if not (folder / BASE).exists():
        return []
    try:
        record = {path: tuple(entry) for path, entry in json.loads((folder / BASE).read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise PretrainedError(f"{folder / BASE} is damaged ({error}); fetch it again, or delete it.") from None
    ours = {path: tuple(entry) for path, entry in base_record(base, ()).items() if path in record}
    same = [path for path, entry in ours.items() if entry[:1] == record[path][:1]]
    changed = [path for path in same if ours[path] != record[path]]
    if not changed:
        return []
    lines = [f"{path} {ours[path][0]} holds other numbers." for path in changed]
    count = f"{len(changed)} of {len(same)} leaves differ"
    first = f"it was made for another base: {count}; load that base, or delete {BASE}."
    return [first, *shortened(lines, "leaves that differ", most=4)]
