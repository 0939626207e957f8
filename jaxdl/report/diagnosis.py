"""What the curves of a run say, and what to try next.

The rules are the ones a beginner's guide teaches. They are checked in this order; the first that holds is the verdict,
and those that hold after it add their evidence (nothing more is read from a run that diverges).

  diverging      a loss is not finite, or the training loss has climbed back half of what it had come down
  overfitting    the evaluation loss has risen from its minimum
  underfitting   the training metric is below the target, or the training loss has hardly come down
  overfitting    evaluation is far behind training
  underfitting   training loss and evaluation loss both still fall
  noisy          the scatter of a loss from point to point is larger than a fifth of all that was learned
  a good fit     none of these

Curves are judged by medians over stretches of points, and no rise or fall counts unless it is larger than three times
what the scatter of the points alone would give.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxdl.errors import JaxdlError
from jaxdl.report.findings import (
    MIN_POINTS,
    Curve,
    Finding,
    Verdict,
    find_broken,
    find_climbing,
    find_gap,
    find_low,
    find_metric_gap,
    find_rising,
    find_scattered,
    find_stuck,
    find_unfinished,
    read_curve,
)
from jaxdl.report.table import format_number

VERDICTS: tuple[str, ...] = get_args(Verdict)

_SUGGESTIONS: dict[str, tuple[str, ...]] = {
    "cannot tell": ("Train longer, or log and evaluate more often.",),
    "diverging": (
        "Lower the learning rate (by 3 to 10 times).",
        "Clip gradients by their global norm.",
        "Warm the learning rate up over the first steps.",
        "Look at the rows of the batch at that step for broken values.",
    ),
    "overfitting": (
        "Stop early: keep the checkpoint where evaluation was best.",
        "Regularise more: weight decay (L2), L1, dropout.",
        "Augment the data, or get more of it.",
        "Use a smaller model.",
    ),
    "underfitting": (
        "Train longer.",
        "Give the model more capacity (wider or deeper).",
        "Raise the learning rate.",
        "Regularise less: weight decay, dropout, augmentation.",
    ),
    "noisy": (
        "Use a larger batch, or average gradients over several.",
        "Lower the learning rate, or let it decay to zero.",
        "Evaluate on more rows.",
    ),
    "a good fit": (
        "Keep it. For more, get more data or a larger model with more regularisation.",
        "Try other seeds, to know how much of the result is chance.",
    ),
}


class Diagnosis(NamedTuple):
    """What `diagnose` found.

    Attributes:
      verdict: one of `VERDICTS`.
      evidence: sentences, each with the numbers that led to it.
      suggestions: what to try, the likeliest remedy first.
      best_step: the step where the evaluation loss was lowest, if there is one.

    Example:
      >>> Diagnosis("noisy", ("...",), ("Use a larger batch.",)).best_step is None
      True
    """

    verdict: Verdict
    evidence: tuple[str, ...]
    suggestions: tuple[str, ...]
    best_step: int | None = None


def diagnose(
    history: Sequence[Mapping[str, Any]],
    *,
    metric: str | None = None,
    higher_is_better: bool = True,
    target: float | None = None,
    loss: str = "loss",
    train: str | None = None,
    evaluation: str = "eval",
) -> Diagnosis:
    """Reads the curves of a run as a tutor would.

    A pure function of its arguments.

    Args:
      history: rows as `read_history` gives them.
      metric: the metric that matters besides the loss (`"accuracy"`), by its name without the data's prefix.
      higher_is_better: of the metric.
      target: what the metric should reach on the training data. Without one, a training metric is never called low.
      loss: the loss's name without prefix.
      train: the prefix of the training values; `None` takes names without prefix, or else `train/`.
      evaluation: the prefix of the evaluation values.

    Returns:
      The verdict with its evidence. "cannot tell" if the training loss has fewer than six points; without enough
      evaluation points it says that overfitting cannot be seen.

    Raises:
      JaxdlError: a target without a metric.

    Source: the order "training error first, then the gap" is Ng, "Machine Learning Yearning", 2018, chapters 20-27.

    Example:
      >>> history = [{"step": s, "loss": 2.0 * 0.5**s, "eval/loss": 0.5 + 0.1 * abs(s - 4)} for s in range(12)]
      >>> found = diagnose(history)
      >>> found.verdict, found.best_step
      ('overfitting', 4)
      >>> found.evidence[0]
      'eval/loss was lowest, 0.5, at step 4 and has risen to 1.2 by step 11.'
    """
    if target is not None and metric is None:
        raise JaxdlError(f"target={target} needs a metric to be compared with; give metric=, for example 'accuracy'.")
    train_loss = read_curve(history, _train_name(history, loss, train))
    eval_loss = read_curve(history, f"{evaluation}/{loss}")
    best_step = int(eval_loss.steps[np.argmin(eval_loss.values)]) if len(eval_loss) else None
    broken = find_broken(history, train_loss.name, eval_loss.name)
    if broken:
        return _conclude(broken, best_step)
    if len(train_loss) < MIN_POINTS:
        evidence = f"{train_loss.name} has {len(train_loss)} points; a shape needs {MIN_POINTS} at the least."
        return _conclude([Finding("cannot tell", evidence)], best_step)
    climbing = find_climbing(train_loss)
    if climbing:
        return _conclude(climbing, best_step)
    metrics = None
    if metric is not None:
        names = _train_name(history, metric, train), f"{evaluation}/{metric}"
        metrics = read_curve(history, names[0]), read_curve(history, names[1])
    findings = find_rising(eval_loss) + find_low(metrics, higher_is_better, target)
    findings += find_stuck(train_loss, metrics, higher_is_better, target)
    findings += find_gap(train_loss, eval_loss) + find_metric_gap(metrics, higher_is_better)
    findings += find_unfinished(train_loss, eval_loss) + find_scattered(train_loss) + find_scattered(eval_loss)
    return _conclude(findings + _rest(findings, train_loss, eval_loss, metrics or ()), best_step)


def _rest(findings: Sequence[Finding], train: Curve, evaluation: Curve, metrics: Sequence[Curve]) -> list[Finding]:
    """What is to be said besides the rules: that all is well, or what cannot be seen."""
    is_seen = len(evaluation) >= MIN_POINTS
    rest = []
    if not is_seen:
        seen = f"{evaluation.name} has {len(evaluation)} points"
        evidence = f"{seen}: whether the model overfits cannot be told from fewer than {MIN_POINTS}."
        rest.append(Finding("cannot tell", evidence))
    if not findings:
        verdict: Verdict = "a good fit" if is_seen else "cannot tell"
        rest.append(Finding(verdict, f"{_span(train)} and has settled."))
        rest += [Finding(verdict, f"{_span(evaluation)} and stays near its lowest.")] if is_seen else []
        rest += [Finding(verdict, f"{_span(curve)}.") for curve in metrics if len(curve)]
    return rest


def _conclude(findings: Sequence[Finding], best_step: int | None) -> Diagnosis:
    verdict = findings[0].verdict
    suggestions = list(_SUGGESTIONS[verdict])
    if verdict == "overfitting" and best_step is not None:
        suggestions[0] = f"Stop early: keep the checkpoint of step {best_step}, where evaluation was best."
    return Diagnosis(verdict, tuple(finding.evidence for finding in findings), tuple(suggestions), best_step)


def _span(curve: Curve) -> str:
    return f"{curve.name} went from {format_number(float(curve.values[0]))} to {format_number(curve.end)}"


def _train_name(history: Sequence[Mapping[str, Any]], name: str, prefix: str | None) -> str:
    if prefix is not None:
        return f"{prefix}/{name}"
    return name if any(name in row for row in history) else f"train/{name}"
