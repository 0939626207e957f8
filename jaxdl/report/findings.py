"""The rules of `diagnose`: each looks at curves and returns what it found, in words with numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxdl.report.history import series
from jaxdl.report.table import format_number

Verdict = Literal["cannot tell", "diverging", "overfitting", "underfitting", "noisy", "a good fit"]

MIN_POINTS = 6  # of a curve, before anything is said about its shape
_RISE = 0.10  # of the evaluation loss over its minimum, as a share of what evaluation had learned
_GAP = 0.25  # between the losses, as a share of what training had learned
_METRIC_GAP = 0.10  # between the metrics, as a share of the training metric
_STILL_FALLING = 0.05  # of all that was learned, within the last quarter of the points
_NOISE = 0.20  # scatter from point to point, as a share of all that was learned


class Finding(NamedTuple):
    """One rule that holds."""

    verdict: Verdict
    evidence: str


class Curve(NamedTuple):
    """The finite points of one metric, in order of their steps."""

    name: str
    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scatter(self) -> float:
        """Standard deviation from point to point about the trend, robustly: from the median second difference."""
        if len(self.values) < 3:
            return 0.0
        bends = np.diff(self.values, n=2)  # of white noise of deviation s: deviation sqrt(6) s
        return float(1.4826 * np.median(np.abs(bends)) / np.sqrt(6.0))

    @property
    def end(self) -> float:
        """The median of the last tenth, of three points at the least."""
        return float(np.median(self.values[-self.n_end :]))

    @property
    def n_end(self) -> int:
        return max(3, len(self.values) // 10)

    @property
    def learned(self) -> float:
        """How far the curve came down from its first point to its lowest stretch, 0 if it never did."""
        return max(0.0, float(self.values[0] - self.smooth().min()))

    def smooth(self) -> np.ndarray:
        """Running medians as long as `end` looks at, centred, fewer at both ends."""
        side = self.n_end // 2
        return np.array([np.median(self.values[max(0, i - side) : i + side + 1]) for i in range(len(self.values))])


def read_curve(history: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """The finite points of a metric."""
    steps, values = series(history, name)
    is_finite = np.isfinite(values)
    order = np.argsort(steps[is_finite], kind="stable")
    return Curve(name, steps[is_finite][order], values[is_finite][order])


def find_broken(history: Sequence[Mapping[str, Any]], *names: str) -> list[Finding]:
    """A value that is not finite."""
    findings = []
    for name in names:
        steps, values = series(history, name)
        broken = np.flatnonzero(~np.isfinite(values))
        if broken.size:
            value = format_number(float(values[broken[0]]))
            times = f"{broken.size} of {len(values)} values are not finite"
            findings.append(Finding("diverging", f"{name} became {value} at step {steps[broken[0]]}; {times}."))
    return findings


def find_climbing(train: Curve) -> list[Finding]:
    """The training loss has climbed back half of what it had come down."""
    lowest = int(np.argmin(train.smooth()))
    low = float(train.smooth()[lowest])
    rise = train.end - low
    came_down = float(train.values[0]) - low
    if rise <= max(0.5 * came_down, 3 * train.scatter, 0.05 * abs(low)):
        return []
    what = f"{train.name} had come down to {format_number(low)} by step {train.steps[lowest]}"
    return [Finding("diverging", f"{what} and has climbed to {format_number(train.end)}.")]


def find_rising(evaluation: Curve) -> list[Finding]:
    """The evaluation loss has risen from its minimum."""
    if len(evaluation) < MIN_POINTS:
        return []
    best = int(np.argmin(evaluation.values))
    low, learned = float(evaluation.values[best]), evaluation.learned
    rise = evaluation.end - float(evaluation.smooth().min())
    if rise <= max(_RISE * learned, 3 * evaluation.scatter, 0.02 * abs(low)):
        return []
    what = f"{evaluation.name} was lowest, {format_number(low)}, at step {evaluation.steps[best]}"
    now = f"has risen to {format_number(float(evaluation.values[-1]))} by step {evaluation.steps[-1]}"
    return [Finding("overfitting", f"{what} and {now}.")]


def find_low(metrics: tuple[Curve, Curve] | None, higher_is_better: bool, target: float | None) -> list[Finding]:
    """The training metric misses the target."""
    if metrics is None or target is None or not len(metrics[0]):
        return []
    train = metrics[0]
    if train.end >= target if higher_is_better else train.end <= target:
        return []
    side = "below" if higher_is_better else "above"
    what = f"{train.name} ends at {format_number(train.end)}"
    return [
        Finding("underfitting", f"{what}, {side} the target of {format_number(float(target))}, on the training data.")
    ]


def find_stuck(
    train: Curve, metrics: tuple[Curve, Curve] | None, higher_is_better: bool, target: float | None
) -> list[Finding]:
    """The training loss never came down, though the target is not reached."""
    start = float(np.median(train.values[: train.n_end]))
    has_arrived = metrics is not None and target is not None and not find_low(metrics, higher_is_better, target)
    if has_arrived or start - train.end > max(train.scatter, 0.01 * abs(start)):
        return []
    what = f"{train.name} starts at {format_number(start)} and ends at {format_number(train.end)}"
    return [Finding("underfitting", f"{what}: it has hardly come down.")]


def find_gap(train: Curve, evaluation: Curve) -> list[Finding]:
    """The evaluation loss is far above the training loss."""
    if len(evaluation) < MIN_POINTS or train.learned <= 0:
        return []
    gap = evaluation.end - train.end
    if gap <= max(_GAP * train.learned, 3 * train.scatter, 3 * evaluation.scatter):
        return []
    what = f"{evaluation.name} ends at {format_number(evaluation.end)}, {train.name} at {format_number(train.end)}"
    share = f"{100 * gap / train.learned:.0f}% of the {format_number(train.learned)} that training came down"
    return [Finding("overfitting", f"{what}: the gap of {format_number(gap)} is {share}.")]


def find_metric_gap(metrics: tuple[Curve, Curve] | None, higher_is_better: bool) -> list[Finding]:
    """The evaluation metric is far behind the training metric."""
    if metrics is None or min(map(len, metrics)) < MIN_POINTS:
        return []
    train, evaluation = metrics
    gap = (train.end - evaluation.end) * (1 if higher_is_better else -1)
    scale = abs(train.end if higher_is_better else evaluation.values[0] - evaluation.end)
    if gap <= max(_METRIC_GAP * scale, 3 * train.scatter, 3 * evaluation.scatter):
        return []
    what = f"{train.name} ends at {format_number(train.end)} and {evaluation.name} at {format_number(evaluation.end)}"
    return [Finding("overfitting", f"{what}: a gap of {format_number(gap)}.")]


def find_unfinished(train: Curve, evaluation: Curve) -> list[Finding]:
    """Both losses still fall, or the training loss does where there is no evaluation curve."""
    findings = []
    for curve in (train, evaluation):
        if len(curve) < MIN_POINTS:
            continue
        before = int(0.75 * (len(curve) - 1))
        then = float(curve.smooth()[before])
        fall = then - curve.end
        if fall <= max(_STILL_FALLING * curve.learned, 3 * curve.scatter):
            return []
        what = f"{curve.name} still fell from {format_number(then)} at step {curve.steps[before]}"
        share = f"{100 * fall / curve.learned:.0f}% of all it came down"
        findings.append(Finding("underfitting", f"{what} to {format_number(curve.end)} at the end, {share}."))
    return findings


def find_scattered(curve: Curve) -> list[Finding]:
    """The points of a loss scatter by more than a fifth of what it came down, and a twentieth of where it is."""
    if len(curve) < MIN_POINTS or curve.scatter <= max(_NOISE * curve.learned, 0.05 * abs(curve.end)):
        return []
    what = f"{curve.name} scatters by {format_number(curve.scatter)} from point to point"
    return [Finding("noisy", f"{what} and came down by {format_number(curve.learned)} in all.")]
