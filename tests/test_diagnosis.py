"""Synthetic curves with a known illness: every verdict, and the near miss beside it."""

import math

import numpy as np
import pytest

from jaxdl.errors import JaxdlError
from jaxdl.report.diagnosis import VERDICTS, Diagnosis, diagnose
from jaxdl.report.findings import Curve

N = 60
STEPS = np.arange(N) * 10
DECAY = np.exp(-np.arange(N) / 4)  # has settled by a half


def history(**curves):
    """Rows of equally long curves; `eval_loss` becomes `eval/loss`."""
    names = {name: name.replace("eval_", "eval/").replace("train_", "train/") for name in curves}
    return [
        {"step": int(step), **{names[name]: float(curve[i]) for name, curve in curves.items()}}
        for i, step in enumerate(STEPS[: len(next(iter(curves.values())))])
    ]


def noise(scale, seed=0):
    return scale * np.random.default_rng(seed).normal(size=N)


GOOD = {"loss": 0.2 + 2 * DECAY, "eval_loss": 0.3 + 2 * DECAY}
RISING = 0.5 + 1.5 * DECAY + 0.02 * np.maximum(0, np.arange(N) - 25)


def test_a_good_fit():
    found = diagnose(history(**GOOD))
    assert found.verdict == "a good fit"
    assert found.evidence == (
        "loss went from 2.2 to 0.2 and has settled.",
        "eval/loss went from 2.3 to 0.3 and stays near its lowest.",
    )


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_good_fit_stays_one_with_a_little_noise_in_any_unit(scale, seed):
    curves = {name: scale * (curve + noise(0.03, seed)) for name, curve in GOOD.items()}
    assert diagnose(history(**curves)).verdict == "a good fit"


def test_a_good_fit_tells_of_the_metric():
    found = diagnose(history(**GOOD, accuracy=0.9 - 0.8 * DECAY, eval_accuracy=0.88 - 0.8 * DECAY), metric="accuracy")
    assert found.verdict == "a good fit"
    assert found.evidence[2:] == ("accuracy went from 0.1 to 0.9.", "eval/accuracy went from 0.08 to 0.88.")


def test_overfitting_by_a_rising_evaluation_loss_names_the_best_step():
    found = diagnose(history(loss=GOOD["loss"], eval_loss=RISING))
    best = int(np.argmin(RISING))
    assert found.verdict == "overfitting"
    assert found.best_step == STEPS[best]
    low, last = RISING[best], RISING[-1]
    assert found.evidence[0] == (
        f"eval/loss was lowest, {low:.4g}, at step {STEPS[best]} and has risen to {last:.4g} by step 590."
    )
    assert found.suggestions[0] == f"Stop early: keep the checkpoint of step {STEPS[best]}, where evaluation was best."
    assert any("weight decay (L2), L1, dropout" in suggestion for suggestion in found.suggestions)


@pytest.mark.parametrize(("slope", "verdict"), [(0.004, "a good fit"), (0.012, "overfitting")])
def test_a_rise_counts_beyond_a_tenth_of_what_was_learned(slope, verdict):
    rising = 0.3 + 2 * DECAY + slope * np.maximum(0, np.arange(N) - 30)
    assert diagnose(history(loss=GOOD["loss"], eval_loss=rising)).verdict == verdict


def test_a_rise_within_the_scatter_is_none():
    scattered = 0.3 + 0.5 * DECAY + noise(0.08)
    found = diagnose(history(loss=GOOD["loss"], eval_loss=scattered))
    assert not any("has risen" in sentence for sentence in found.evidence)


@pytest.mark.parametrize(("gap", "verdict"), [(0.4, "a good fit"), (0.6, "overfitting")])
def test_overfitting_by_a_gap_of_a_quarter_of_what_training_learned(gap, verdict):
    found = diagnose(history(loss=0.1 + 2 * DECAY, eval_loss=0.1 + gap + (2 - gap) * DECAY))
    assert found.verdict == verdict
    if verdict == "overfitting":
        what = "eval/loss ends at 0.7, loss at 0.1: the gap of 0.6 is 30% of the 2 that training came down."
        assert found.evidence == (what,)


def test_evaluation_better_than_training_is_no_gap():
    """Dropout and augmentation make the training loss the larger one."""
    assert diagnose(history(loss=GOOD["eval_loss"] + 0.8, eval_loss=GOOD["loss"])).verdict == "a good fit"


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.93, "a good fit"), (0.85, "overfitting")])
def test_overfitting_by_the_metric(accuracy, verdict):
    curves = {**GOOD, "accuracy": 0.99 - 0.9 * DECAY, "eval_accuracy": accuracy - 0.8 * DECAY}
    assert diagnose(history(**curves), metric="accuracy").verdict == verdict


@pytest.mark.parametrize(("error", "verdict"), [(0.05, "a good fit"), (0.4, "overfitting")])
def test_a_metric_of_which_less_is_better(error, verdict):
    curves = {**GOOD, "mae": 0.02 + 0.9 * DECAY, "eval_mae": error + 0.6 * DECAY}
    assert diagnose(history(**curves), metric="mae", higher_is_better=False).verdict == verdict


@pytest.mark.parametrize(("target", "verdict"), [(0.69, "a good fit"), (0.71, "underfitting")])
def test_underfitting_by_a_target(target, verdict):
    curves = {**GOOD, "accuracy": 0.7 - 0.6 * DECAY, "eval_accuracy": 0.69 - 0.6 * DECAY}
    found = diagnose(history(**curves), metric="accuracy", target=target)
    assert found.verdict == verdict
    if verdict == "underfitting":
        assert found.evidence == ("accuracy ends at 0.7, below the target of 0.71, on the training data.",)
        assert any("capacity" in suggestion for suggestion in found.suggestions)


def test_a_target_of_which_less_is_better():
    curves = {**GOOD, "mae": 0.3 + DECAY, "eval_mae": 0.31 + DECAY}
    found = diagnose(history(**curves), metric="mae", higher_is_better=False, target=0.2)
    assert (found.verdict, found.evidence[0][:38]) == ("underfitting", "mae ends at 0.3, above the target of 0")


def test_bias_comes_before_variance():
    """Training below its target with a gap on top: the model must first learn its training data."""
    curves = {"loss": 0.1 + 2 * DECAY, "eval_loss": 0.9 + 1.2 * DECAY}
    curves |= {"accuracy": 0.7 - 0.6 * DECAY, "eval_accuracy": 0.5 - 0.4 * DECAY}
    found = diagnose(history(**curves), metric="accuracy", target=0.9)
    assert found.verdict == "underfitting"
    assert len(found.evidence) == 3


@pytest.mark.parametrize(("tail", "verdict"), [(6, "a good fit"), (40, "underfitting")])
def test_underfitting_while_both_losses_still_fall(tail, verdict):
    fall = np.exp(-np.arange(N) / tail)
    found = diagnose(history(loss=0.2 + 2 * fall, eval_loss=0.3 + 2 * fall))
    assert found.verdict == verdict
    if verdict == "underfitting":
        assert found.evidence[0].startswith("loss still fell from 0.8")
        assert found.suggestions[0] == "Train longer."


def test_training_alone_still_falling_is_not_underfitting():
    fall = np.exp(-np.arange(N) / 40)
    assert diagnose(history(loss=0.2 + 2 * fall, eval_loss=0.9 + DECAY)).verdict != "underfitting"


def test_underfitting_of_a_run_that_never_learned():
    found = diagnose(history(loss=np.full(N, 2.303), eval_loss=np.full(N, 2.303)))
    assert found.verdict == "underfitting"
    assert found.evidence == ("loss starts at 2.303 and ends at 2.303: it has hardly come down.",)


def test_a_run_that_started_where_it_should_end_is_not_stuck():
    flat = {"loss": np.full(N, 0.01), "eval_loss": np.full(N, 0.01), "accuracy": np.full(N, 0.99)}
    assert diagnose(history(**flat), metric="accuracy", target=0.95).verdict == "a good fit"
    assert diagnose(history(**flat), metric="accuracy", target=0.999).verdict == "underfitting"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_diverging_by_a_value_that_is_not_finite(value, name):
    curves = {key: curve.copy() for key, curve in GOOD.items()}
    curves[name][40:] = value
    found = diagnose(history(**curves))
    shown = name.replace("eval_", "eval/")
    assert found.verdict == "diverging"
    assert found.evidence == (f"{shown} became {value} at step 400; 20 of 60 values are not finite.",)
    assert [word for word in ("Lower", "Clip", "Warm") if not any(word in line for line in found.suggestions)] == []


def test_diverging_at_once_needs_no_history():
    assert diagnose([{"step": 1, "loss": math.nan}]).verdict == "diverging"


@pytest.mark.parametrize(("height", "verdict"), [(0.4, "a good fit"), (1.3, "diverging")])
def test_diverging_when_half_of_what_was_learned_is_lost(height, verdict):
    climb = height * np.clip((np.arange(N) - 35) / 10, 0, 1)
    found = diagnose(history(loss=0.2 + 2 * DECAY + climb, eval_loss=0.2 + 2 * DECAY + climb * 0.1))
    assert found.verdict == verdict
    if verdict == "diverging":
        assert found.evidence[0].startswith("loss had come down to 0.20")
        assert found.evidence[0].endswith("and has climbed to 1.5.")


def test_diverging_from_the_first_step():
    up = 1 + 0.1 * np.arange(N)
    assert diagnose(history(loss=up, eval_loss=up)).verdict == "diverging"


def test_one_spike_is_not_diverging():
    curve = GOOD["loss"].copy()
    curve[-1] = 50.0
    assert diagnose(history(loss=curve, eval_loss=GOOD["eval_loss"])).verdict == "a good fit"


@pytest.mark.parametrize(("scale", "verdict"), [(0.05, "a good fit"), (0.6, "noisy")])
def test_noisy(scale, verdict):
    curves = {"loss": 2 + DECAY + noise(scale), "eval_loss": 2 + DECAY}
    found = diagnose(history(**curves))
    assert found.verdict == verdict
    if verdict == "noisy":
        assert "from point to point" in found.evidence[0]
        assert "batch" in found.suggestions[0]


@pytest.mark.parametrize("seed", range(4))
def test_scatter_measures_the_deviation_of_white_noise_on_a_slope(seed):
    values = np.random.default_rng(seed).normal(size=4000) * 0.3 + np.arange(4000) * 0.05
    assert Curve("x", np.arange(4000), values).scatter == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_little_history(n):
    found = diagnose(history(**{name: curve[:n] for name, curve in GOOD.items()}) if n else [])
    assert found.verdict == "cannot tell"
    assert f"has {n} points; a shape needs 6" in found.evidence[0]


def test_six_points_are_enough():
    fall = 0.1 ** np.arange(6)
    assert diagnose(history(loss=fall, eval_loss=fall)).verdict == "a good fit"


def test_without_evaluation_it_says_what_cannot_be_seen():
    found = diagnose(history(loss=GOOD["loss"]))
    assert found.verdict == "cannot tell"
    assert found.best_step is None
    assert found.evidence == (
        "eval/loss has 0 points: whether the model overfits cannot be told from fewer than 6.",
        "loss went from 2.2 to 0.2 and has settled.",
    )
    still_falling = diagnose(history(loss=2 - 0.02 * np.arange(N)))
    assert still_falling.verdict == "underfitting"
    assert "eval/loss has 0 points" in still_falling.evidence[1]


def test_rows_apart_and_prefixed_names_give_the_same_answer():
    together = history(loss=GOOD["loss"], eval_loss=RISING)
    apart = [{"step": row["step"], "train/loss": row["loss"]} for row in together]
    apart += [{"step": row["step"], "val/loss": row["eval/loss"]} for row in reversed(together)]
    found = diagnose(apart, evaluation="val")
    plain = diagnose(together)
    assert (found.verdict, found.best_step) == (plain.verdict, plain.best_step)
    assert diagnose(apart, train="train", evaluation="val") == found


def test_it_is_a_pure_function():
    rows = history(**GOOD)
    copy = [dict(row) for row in rows]
    assert diagnose(rows) == diagnose(rows)
    assert rows == copy


def test_a_target_needs_a_metric():
    with pytest.raises(JaxdlError, match=r"target=0\.9 needs a metric"):
        diagnose(history(**GOOD), target=0.9)


def test_every_statement_has_a_number_and_every_verdict_a_remedy():
    runs = [history(**GOOD), history(loss=GOOD["loss"], eval_loss=RISING), history(loss=GOOD["loss"]), []]
    runs += [history(loss=np.full(N, math.nan)), history(loss=2 + DECAY + noise(0.6), eval_loss=2 + DECAY)]
    runs += [history(loss=np.full(N, 1.0), eval_loss=np.full(N, 1.0))]
    found = [diagnose(run) for run in runs]
    assert {one.verdict for one in found} == set(VERDICTS)
    assert all(isinstance(one, Diagnosis) and one.suggestions for one in found)
    assert all(any(letter.isdigit() for letter in sentence) for one in found for sentence in one.evidence)
