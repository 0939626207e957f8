"""The contract of fine-tuning: what is frozen stays bit for bit what it was. It is stated with hashes, not believed."""

import hashlib
from collections.abc import Mapping
from typing import Any

from jaxdl import paths
from jaxdl.checkpoint.leaves import add_hashes, to_host
from jaxdl.checkpoint.manifest import LeafRecord
from jaxdl.errors import JaxdlError
from jaxdl.finetune.statistics import frozen_statistics
from jaxdl.paths import Rules, Tree


class ContractError(JaxdlError):
    """A frozen leaf is not what it was."""

    exit_code = 1


class Frozen:
    """The hashes of everything that a run must leave alone: frozen parameters, and the statistics of frozen modules.

    Args:
      params: the parameters before the run.
      extra: the other collections, `{}` where there is none.
      trainable: the rules given to `make_train_step`.

    Attributes:
      hashes: `{path: sha256}` of dtype, shape and bytes, with paths such as `params/body/kernel` and
        `extra/batch_stats/body/norm/mean`.
      n_bytes: of all these leaves together.

    Raises:
      RuleError: the rules do not fit the tree.
      CheckpointError: a leaf cannot be read here (abstract, donated, spread over processes).

    Example:
      >>> import numpy as np
      >>> params = {"body": {"kernel": np.ones(3, np.float32)}, "head": {"kernel": np.zeros(2, np.float32)}}
      >>> frozen = Frozen(params, {}, [("head/.*", True), (".*", False)])
      >>> params["head"]["kernel"] += 1
      >>> print(frozen.check(params, {}))
      1 leaf, 12 bytes: bit-identical to the base (sha256 8f31fc6d5f7e)
      >>> params["body"]["kernel"][0] += 2e-7
      >>> frozen.check(params, {})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jaxdl.finetune.contract.ContractError: frozen leaves are not those of the base: 1 problem(s)
        - params/body/kernel: float32[3] with sha256 ... was float32[3] with sha256 ...
        Remedy: give the same trainable rules to create_state, make_train_step and the loss.
    """

    def __init__(self, params: Tree, extra: Tree, trainable: Rules) -> None:
        is_moving = paths.flatten(paths.match(trainable, params, what="trainable"))
        is_frozen = paths.flatten(frozen_statistics(params, extra, trainable))
        chosen = {f"params/{path}" for path, moves in is_moving.items() if not moves}
        chosen |= {f"extra/{path}" for path, is_kept in is_frozen.items() if is_kept}
        flat = {path: leaf for path, leaf in _flatten(params, extra).items() if path in chosen}
        self._records = {path: _describe(path, leaf) for path, leaf in flat.items()}
        self.hashes = {path: record.sha256 for path, record in self._records.items()}
        self.n_bytes = sum(leaf.nbytes for leaf in flat.values())

    @property
    def digest(self) -> str:
        """One sha256 of all paths and hashes, in the order of the paths: the name of the base."""
        return digest_of(self.hashes)

    def check(self, params: Tree, extra: Tree) -> str:
        """Compares the leaves with what they were.

        Args:
          params, extra: the trees after the run; leaves that were not there before do not matter.

        Returns:
          A statement for the report.

        Raises:
          ContractError: every leaf that changed or is missing.
        """
        flat = _flatten(params, extra)
        problems = [problem for path in self._records if (problem := self._problem(path, flat))]
        if problems:
            more = [f"and {len(problems) - 8} more."] if len(problems) > 8 else []
            raise ContractError(
                f"{ContractError.listing('frozen leaves are not those of the base', problems[:8] + more)}\n  Remedy: "
                "give the same trainable rules to create_state, make_train_step and the loss."
            )
        n = len(self._records)
        leaves = "1 leaf" if n == 1 else f"{n} leaves"
        return f"{leaves}, {self.n_bytes:,} bytes: bit-identical to the base (sha256 {self.digest[:12]})"

    def _problem(self, path: str, flat: Mapping[str, Any]) -> str | None:
        was = self._records[path]
        if path not in flat:
            return f"{path} is missing; nearest: {', '.join(paths.nearest(path, flat))}."
        now = _describe(path, flat[path])
        if now == was:
            return None
        return f"{path}: {now} with sha256 {now.sha256[:12]} was {was} with sha256 {was.sha256[:12]}."


def digest_of(hashes: Mapping[str, str]) -> str:
    """One sha256 of all paths and hashes, in the order of the paths.

    Example:
      >>> digest_of({"a": "0", "b": "1"}) == digest_of({"b": "1", "a": "0"})
      True
    """
    text = "\n".join(f"{path} {sha256}" for path, sha256 in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _flatten(params: Tree, extra: Tree) -> dict[str, Any]:
    return paths.flatten({"params": params, "extra": extra})


def _describe(path: str, leaf: Any) -> LeafRecord:
    """The shape, dtype and hash of one leaf; one at a time, so that one copy is held."""
    arrays, records = to_host({path: leaf})
    return add_hashes(records, arrays)[path]
