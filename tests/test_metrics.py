"""Metrics against scikit-learn and NumPy; sums over parts equal the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as oracle

from jaxdl import JaxdlError, metrics

RNG = np.random.default_rng(1)
N, C = 200, 4
LABELS = RNG.integers(0, C, N)
LOGITS = (RNG.normal(size=(N, C)) + 1.5 * np.eye(C)[LABELS]).astype(np.float32)
WEIGHT = RNG.integers(1, 4, N).astype(np.float32)
PREDICTED = LOGITS.argmax(1)
J = (jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(WEIGHT))


def parts(fn):
    """The metric of three uneven parts, added."""
    cuts = [slice(0, 30), slice(30, 31), slice(31, N)]
    total = {}
    for cut in cuts:
        total = metrics.add(total, {"m": fn(*(x[cut] for x in J))})
    return metrics.finish(total)


def test_accuracy_and_top_k():
    assert parts(metrics.accuracy)["m"] == pytest.approx(oracle.accuracy_score(LABELS, PREDICTED, sample_weight=WEIGHT))
    want = oracle.top_k_accuracy_score(LABELS, LOGITS, k=2, sample_weight=WEIGHT)
    assert parts(lambda x, y, w: metrics.top_k_accuracy(x, y, 2, w))["m"] == pytest.approx(want)
    with pytest.raises(JaxdlError, match=r"k=5 must lie in 1\.\.4"):
        metrics.top_k_accuracy(J[0], J[1], 5)


def test_confusion_precision_recall_f1():
    got = parts(metrics.confusion)
    np.testing.assert_allclose(got["m/matrix"], oracle.confusion_matrix(LABELS, PREDICTED, sample_weight=WEIGHT))
    p, r, f, _ = oracle.precision_recall_fscore_support(LABELS, PREDICTED, sample_weight=WEIGHT, average="macro")
    assert (got["m/precision"], got["m/recall"], got["m/f1"]) == pytest.approx((p, r, f))


def test_classes_never_seen_do_not_count_in_macro_means():
    got = metrics.confusion(jnp.eye(3)[jnp.array([0, 1])], jnp.array([0, 1])).finish()
    assert got["f1"] == 1.0
    assert got["f1_by_class"].tolist() == [1.0, 1.0, 0.0]


def test_binary_counts():
    labels, logits = RNG.integers(0, 2, (N, 3)), RNG.normal(size=(N, 3)).astype(np.float32)
    got = metrics.binary_counts(jnp.asarray(logits), jnp.asarray(labels), J[2]).finish()
    flat = [labels.ravel(), (logits > 0).ravel()]
    p, r, f, _ = oracle.precision_recall_fscore_support(*flat, sample_weight=np.repeat(WEIGHT, 3), average="binary")
    assert (got["precision"], got["recall"], got["f1"]) == pytest.approx((p, r, f))


def test_r2():
    targets = RNG.normal(size=(N, 2)).astype(np.float32)
    predictions = targets + 0.3 * RNG.normal(size=(N, 2)).astype(np.float32)
    got = metrics.r2(jnp.asarray(predictions), jnp.asarray(targets), J[2]).finish()
    assert got == pytest.approx(oracle.r2_score(targets, predictions, sample_weight=WEIGHT), rel=1e-5)


def test_calibration_and_brier_by_a_loop():
    got = parts(metrics.calibration)
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    confidence, right = probability.max(1), PREDICTED == LABELS
    ece = 0.0
    for i in range(15):
        inside = (confidence * 15).astype(int).clip(0, 14) == i
        ece += abs((WEIGHT * (confidence - right))[inside].sum())
    assert got["m/ece"] == pytest.approx(ece / WEIGHT.sum(), rel=1e-4)
    brier = (((probability - np.eye(C)[LABELS]) ** 2).sum(1) * WEIGHT).sum() / WEIGHT.sum()
    assert got["m/brier"] == pytest.approx(brier, rel=1e-5)


def test_perplexity_is_the_exponential_of_the_mean():
    total = metrics.add({"p": metrics.Perplexity(3.0, 1.0)}, {"p": metrics.Perplexity(1.0, 3.0)})
    assert metrics.finish(total)["p"] == pytest.approx(np.e)


def test_soft_labels_count_by_their_largest():
    soft = jnp.eye(C)[J[1]] * 0.6 + 0.1
    assert metrics.accuracy(J[0], soft).finish() == metrics.accuracy(J[0], J[1]).finish()
    assert metrics.calibration(J[0], soft).finish()["ece"] == metrics.calibration(J[0], J[1]).finish()["ece"]


def test_nothing_counted_is_nan_and_not_an_error():
    assert np.isnan(metrics.mean(jnp.ones(2), jnp.zeros(2)).finish())


def test_names_must_agree():
    with pytest.raises(JaxdlError, match="metrics differ between batches"):
        metrics.add({"a": metrics.Mean(1.0, 1.0)}, {"b": metrics.Mean(1.0, 1.0)})


def test_metrics_are_trees():
    doubled = jax.tree.map(lambda x: x * 2, metrics.confusion(J[0], J[1]))
    assert isinstance(doubled, metrics.Confusion)
    assert doubled.finish()["accuracy"] == metrics.confusion(J[0], J[1]).finish()["accuracy"]
