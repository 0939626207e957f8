import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.label_scores import score_labels

PLATFORMS = ("cpu", "gpu", "tpu")
LOGITS = np.random.default_rng(0).standard_normal((3, 5, 7)) * 4
LABELS = np.random.default_rng(1).integers(0, 7, (3, 5))


@pytest.fixture(params=PLATFORMS)
def platform(request, monkeypatch):
    """The form of each platform, which runs on a CPU as well."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def test_against_float64(platform):
    scores = score_labels(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS))
    np.testing.assert_allclose(scores.log_z, np.log(np.exp(LOGITS).sum(-1)), rtol=1e-6)
    np.testing.assert_allclose(scores.at_label, np.take_along_axis(LOGITS, LABELS[..., None], -1)[..., 0], rtol=1e-6)
    assert np.array_equal(scores.is_likeliest, LOGITS.argmax(-1) == LABELS)
    assert 0 < np.sum(scores.is_likeliest) < LABELS.size


def test_gradients_against_float64_in_both_modes(platform):
    weight = np.random.default_rng(2).standard_normal((3, 5))

    def loss(logits):
        scores = score_labels(logits, jnp.asarray(LABELS))
        return jnp.sum(jnp.asarray(weight, jnp.float32) * (scores.log_z - 2 * scores.at_label))

    logits = jnp.asarray(LOGITS, jnp.float32)
    share = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = weight[..., None] * (share - 2 * np.eye(7)[LABELS])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), expected, atol=2e-6)
    np.testing.assert_allclose(jax.jvp(loss, (logits,), (logits,))[1], (expected * LOGITS).sum(), rtol=1e-5)


def test_second_derivatives(platform):
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)

    def curvature(fn):
        return jax.grad(lambda x: jnp.sum(jax.grad(lambda y: jnp.sum(fn(y)))(x) ** 2))(logits)

    found = curvature(lambda y: score_labels(y, labels).log_z)
    np.testing.assert_allclose(found, curvature(lambda y: jax.nn.logsumexp(y, -1)), atol=1e-6)
    assert np.abs(found).max() > 0.01


def test_rounds_logits_of_bfloat16_no_further(platform):
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    low, high = (score_labels(x, jnp.asarray(LABELS)) for x in (logits, logits.astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, low, high)


def test_the_likeliest_is_argmax_among_ties_too(platform):
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 50, 7)), jnp.float32)
    for label in range(7):
        is_likeliest = score_labels(logits, jnp.full((4, 50), label)).is_likeliest
        assert bool(jnp.array_equal(is_likeliest, jnp.argmax(logits, -1) == label))
    with_nan = logits.at[0, 0, 6].set(jnp.nan)
    assert not bool(score_labels(with_nan, jnp.zeros((4, 50), int)).is_likeliest[0, 0])


def test_labels_out_of_range_and_masked_classes(platform):
    """-1 is the last class; what no class is, is NaN and never right; a class of -inf takes no part."""
    logits, labels = jnp.asarray(LOGITS[0], jnp.float32), jnp.array([-1, 6, 7, -8, 0])
    found = score_labels(logits, labels)
    np.testing.assert_array_equal(found.at_label[:2], logits[jnp.arange(2), 6])
    assert np.isnan(found.at_label).tolist() == [False, False, True, True, False]
    assert np.array_equal(found.is_likeliest[:2], np.argmax(LOGITS[0, :2], -1) == 6)
    assert not np.any(found.is_likeliest[2:4])

    def loss(logits):
        scores = score_labels(logits, labels)
        return jnp.sum(jnp.where(jnp.isnan(scores.at_label), 0.0, scores.log_z - scores.at_label))

    masked = logits.at[:, 2].set(-jnp.inf)
    grad = jax.grad(loss)(masked)
    assert np.isfinite(grad).all()
    assert np.all(grad[:, 2] == 0)
    np.testing.assert_allclose(score_labels(masked, labels).log_z, jax.nn.logsumexp(masked, -1), rtol=1e-6)


def test_a_gpu_reads_the_logits_once_and_scatters_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    forward = str(jax.make_jaxpr(score_labels)(logits, labels))
    assert forward.count("reduce[") == 1
    assert "reduce_max" not in forward.partition("reduce[")[0]
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(score_labels(x, labels).at_label)))(logits))
