"""Stopping a run whose evaluated metric no longer improves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxdl import metrics as metrics_lib
from jaxdl.errors import JaxdlError


@dataclass(frozen=True)
class EarlyStopping:
    """Stops when an evaluated metric has not improved for a while.

    Attributes:
      metric: the name as it is logged, such as `"eval/loss"`.
      patience: evaluations without improvement before the run stops.
      mode: `"min"` or `"max"`.
      min_delta: an improvement smaller than this does not count.
    """

    metric: str
    patience: int
    mode: str = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in ("min", "max"):
            problems.append(f"mode={self.mode!r} must be 'min' or 'max'.")
        if self.patience < 1:
            problems.append(f"patience={self.patience} must be at least 1.")
        if self.min_delta < 0:
            problems.append(f"min_delta={self.min_delta} must not be negative.")
        if problems:
            raise JaxdlError.listing("early stopping", problems)


class Patience:
    """Counts evaluations without improvement; `to_json` and `from_json` carry the count over a restart.

    Args:
      rule: what to watch, or None to wait for ever.

    Example:
      >>> patience = Patience(EarlyStopping("eval/loss", patience=2))
      >>> [patience.is_over({"eval/loss": loss}) for loss in (3.0, 2.0, 2.5, 2.1)]
      [False, False, False, True]
    """

    def __init__(self, rule: EarlyStopping | None) -> None:
        self._rule = rule
        self._best: float | None = None
        self._n_without_gain = 0

    def is_over(self, found: Mapping[str, Any]) -> bool:
        """Takes the metrics of an evaluation and says whether it is time to stop.

        Raises:
          JaxdlError: the watched metric is not among them.
        """
        rule = self._rule
        if rule is None:
            return False
        if rule.metric not in found:
            known = ", ".join(metrics_lib.scalars(found)) or "none"
            raise JaxdlError(f"early stopping watches {rule.metric!r}, which no evaluator gives; there are: {known}.")
        value = found[rule.metric] if rule.mode == "min" else -found[rule.metric]
        is_better = self._best is None or value < self._best - rule.min_delta
        self._best, self._n_without_gain = (value, 0) if is_better else (self._best, self._n_without_gain + 1)
        return self.is_spent

    @property
    def is_spent(self) -> bool:
        """Whether the last evaluation already said to stop."""
        return self._rule is not None and self._n_without_gain >= self._rule.patience

    def to_json(self) -> dict[str, Any]:
        return {"best": self._best, "n_without_gain": self._n_without_gain}

    def from_json(self, saved: Mapping[str, Any] | None) -> None:
        if saved is not None:
            self._best, self._n_without_gain = saved["best"], saved["n_without_gain"]
