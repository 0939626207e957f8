"""Objectives: what they read of a batch, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import JaxdlError, losses, metrics
from jaxdl.objectives import classification, regression

LOGITS = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
BATCH = {"label": jnp.array([0, 0, 1]), "weight": jnp.array([1.0, 2.0, 0.0])}


def test_classification_weighs_rows():
    out = classification(label_smoothing=0.1)(LOGITS, BATCH)
    want = losses.cross_entropy(LOGITS[:2], BATCH["label"][:2], BATCH["weight"][:2], label_smoothing=0.1)
    np.testing.assert_allclose((out.total, out.weight), want, rtol=1e-6)
    assert metrics.finish(out.sums) == {"accuracy": pytest.approx(1 / 3)}


def test_details_are_for_evaluation():
    found = metrics.finish(classification(is_detailed=True)(LOGITS, BATCH).sums)
    assert found["confusion/matrix"].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert {"calibration/ece", "calibration/brier"} <= found.keys()


@pytest.mark.parametrize(("loss", "want"), [("squared_error", 5.0), ("absolute_error", 3.0), ("huber", 2.0)])
def test_regression_by_any_distance(loss, want):
    out = regression(loss=loss, is_detailed=True)(jnp.array([[1.0], [2.0]]), {"target": jnp.array([0.0, 0.0])})
    assert float(out.total) == want
    assert metrics.finish(out.sums)["mean_absolute_error"] == 1.5


def test_regression_of_several_targets_and_an_unknown_loss():
    out = regression()(jnp.ones((2, 3)), {"target": jnp.zeros((2, 3))})
    assert (float(out.total), float(out.weight)) == (6.0, 6.0)
    with pytest.raises(JaxdlError, match="loss='hubert' is unknown; nearest: huber"):
        regression(loss="hubert")
    with pytest.raises(JaxdlError, match="must be equal"):
        regression()(jnp.ones((2, 3)), {"target": jnp.zeros((2, 1))})
