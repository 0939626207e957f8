"""What became of every tensor and every leaf of an import."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest


class PretrainedError(JaxdlError):
    """A folder of pretrained weights does not fit what was asked of it; the message lists every problem."""


class Ledger(NamedTuple):
    """What became of every leaf and tensor; `str` gives a summary of a few lines.

    Attributes:
      source: where the tensors came from.
      loaded: `{leaf path: tensor name}`; several names of one leaf are joined with " + ".
      fresh: leaf paths that the model initialised.
      dropped: tensors that were left out: named by `drop`, of fresh leaves, or of parts that this model lacks.
      ignored: buffers that hold nothing learned.
      sizes: `{leaf path: number of elements}`.

    Example:
      >>> print(Ledger("bert", {"pooler/kernel": "pooler.dense.weight"}, ("head/bias",), (), (), {"pooler/kernel": 9,
      ...   "head/bias": 3}))
      loaded 1/2 leaves (75.0 % of parameters) from bert
        fresh 1: head/bias
    """

    source: str
    loaded: dict[str, str]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    ignored: tuple[str, ...]
    sizes: dict[str, int]

    def __str__(self) -> str:
        n_loaded = sum(self.sizes[path] for path in self.loaded)
        percent = 100 * n_loaded / max(sum(self.sizes.values()), 1)
        lines = [
            f"loaded {len(self.loaded)}/{len(self.sizes)} leaves ({percent:.1f} % of parameters) from {self.source}",
            _listing("fresh", self.fresh),
            _listing("dropped", self.dropped),
            _listing("ignored", self.ignored),
        ]
        return "\n".join(filter(None, lines))


def _listing(title: str, items: Sequence[str]) -> str:
    more = f" and {len(items) - 6} more" if len(items) > 6 else ""
    return f"  {title} {len(items)}: {', '.join(items[:6])}{more}" if items else ""


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The number of elements of each leaf.

    Example:
      >>> sizes_of({"kernel": (2, 3)})
      {'kernel': 6}
    """
    return {path: math.prod(shape) for path, shape in shapes.items()}


def near(name: str, names: Iterable[str]) -> str:
    """The names of tensors or leaves most similar to `name`, as a phrase.

    Example:
      >>> near("bert.poler.weight", ["bert.encoder.weight", "bert.pooler.weight"])
      'bert.pooler.weight, bert.encoder.weight'
    """
    slashed = {other.replace(".", "/"): other for other in names}
    return ", ".join(slashed[found] for found in nearest(name.replace(".", "/"), slashed)) or "there are none"


def shortened(problems: Sequence[str], what: str, *, most: int = 10) -> list[str]:
    """At most `most` problems of a kind, and how many there are besides.

    Example:
      >>> shortened(["a", "b", "c"], "missing tensors", most=2)
      ['a', 'b', '... and 1 more missing tensors.']
    """
    rest = len(problems) - most
    return [*problems[:most], f"... and {rest} more {what}."] if rest > 0 else list(problems)
