"""Losses against NumPy float64 and PyTorch, and their sums under padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import JaxdlError, losses

RNG = np.random.default_rng(0)
LOGITS, LABELS, WEIGHT = RNG.normal(size=(6, 5)), RNG.integers(0, 5, 6), RNG.uniform(0.5, 2.0, 6)
SOFT = RNG.dirichlet(np.ones(5), 6)
PREDICTIONS, TARGETS = RNG.normal(size=(6, 3)) * 2, RNG.normal(size=(6, 3))


def f32(x):
    return jnp.asarray(x, jnp.float32) if np.issubdtype(np.asarray(x).dtype, np.floating) else jnp.asarray(x)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (losses.squared_error, lambda e: e**2),
        (losses.absolute_error, np.abs),
        (lambda *a: losses.huber(*a, delta=0.7), lambda e: np.where(abs(e) < 0.7, e**2 / 2, 0.7 * (abs(e) - 0.35))),
    ],
)
def test_distances_against_numpy(loss, formula):
    out = loss(f32(PREDICTIONS), f32(TARGETS), f32(WEIGHT))
    each = formula(PREDICTIONS - TARGETS) * WEIGHT[:, None]
    np.testing.assert_allclose(out.total, each.sum(), rtol=1e-6)
    np.testing.assert_allclose(out.weight, WEIGHT.sum() * 3, rtol=1e-6)


def test_distances_never_broadcast():
    with pytest.raises(JaxdlError, match=r"shape \(4, 1\) and targets \(4,\); they must be equal"):
        losses.squared_error(jnp.ones((4, 1)), jnp.ones(4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"class_weights": np.array([1.0, 2.0, 0.5, 3.0, 1.0])},
        {"label_smoothing": 0.1, "class_weights": np.array([1.0, 1.0, 1.0, 1.0, 1.0])},
    ],
)
@pytest.mark.parametrize("kind", ["int", "soft"])
def test_cross_entropy_against_torch(options, kind):
    torch = pytest.importorskip("torch")
    if kind == "soft" and "class_weights" in options and options["class_weights"].std() > 0:
        pytest.skip("PyTorch defines class weights of soft labels otherwise")
    labels = LABELS if kind == "int" else SOFT
    weights = options.get("class_weights")
    tensor = torch.tensor(LOGITS, requires_grad=True)
    want = torch.nn.functional.cross_entropy(
        tensor,
        torch.tensor(labels),
        weight=None if weights is None else torch.tensor(weights),
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    want.backward()
    ours = {key: f32(value) if key == "class_weights" else value for key, value in options.items()}

    def mean_loss(logits):
        total, weight = losses.cross_entropy(logits, f32(labels), **ours)
        return total / weight

    value, grad = jax.value_and_grad(mean_loss)(f32(LOGITS))
    np.testing.assert_allclose(value, want.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), atol=1e-6)
    assert np.abs(grad).max() > 0.01


def test_focal_and_z_loss_against_numpy():
    log_p = log_softmax(LOGITS)[np.arange(6), LABELS]
    log_z = np.log(np.exp(LOGITS).sum(-1))
    focal = losses.cross_entropy(f32(LOGITS), f32(LABELS), f32(WEIGHT), focal_gamma=2.0)
    np.testing.assert_allclose(focal.total, (WEIGHT * (1 - np.exp(log_p)) ** 2 * -log_p).sum(), rtol=1e-5)
    z = losses.cross_entropy(f32(LOGITS), f32(LABELS), f32(WEIGHT), z_loss=0.01)
    np.testing.assert_allclose(z.total, (WEIGHT * (-log_p + 0.01 * log_z**2)).sum(), rtol=1e-6)


def test_focal_gradient_is_finite_at_certainty():
    grad = jax.grad(lambda x: losses.cross_entropy(x, jnp.array([0]), focal_gamma=0.5).total)(jnp.array([[200.0, 0.0]]))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_binary_cross_entropy_against_numpy(gamma):
    labels = RNG.integers(0, 2, LOGITS.shape)
    out = losses.binary_cross_entropy(f32(LOGITS), f32(labels), f32(WEIGHT), positive_weight=3.0, focal_gamma=gamma)
    p = 1 / (1 + np.exp(-LOGITS))
    each = 3 * labels * (1 - p) ** gamma * -np.log(p) + (1 - labels) * p**gamma * -np.log(1 - p)
    np.testing.assert_allclose(out.total, (each * WEIGHT[:, None]).sum(), rtol=1e-5)


def test_binary_cross_entropy_survives_extreme_logits():
    out = losses.binary_cross_entropy(jnp.array([1e4, -1e4]), jnp.array([1, 0]))
    assert out.finish() == 0.0


def test_a_row_of_weight_zero_adds_exactly_nothing():
    logits = f32(np.concatenate([LOGITS, np.full((2, 5), np.nan)]))
    labels = jnp.concatenate([f32(LABELS), jnp.zeros(2, int)])
    weight = f32(np.concatenate([WEIGHT, [0.0, 0.0]]))
    padded = losses.cross_entropy(logits, labels, weight)
    plain = losses.cross_entropy(f32(LOGITS), f32(LABELS), f32(WEIGHT))
    assert float(padded.weight) == float(plain.weight)
    np.testing.assert_allclose(padded.total, plain.total, rtol=1e-6)


def test_token_losses_take_a_weight_per_row_or_token():
    logits, labels = f32(RNG.normal(size=(2, 3, 5))), f32(RNG.integers(0, 5, (2, 3)))
    by_row = losses.cross_entropy(logits, labels, jnp.array([1.0, 0.0]))
    by_token = losses.cross_entropy(logits, labels, jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert float(by_row.total) == float(by_token.total)
    assert float(by_row.weight) == 3.0


def test_all_problems_of_cross_entropy_at_once():
    with pytest.raises(JaxdlError) as caught:
        losses.cross_entropy(
            jnp.zeros((4, 3)), jnp.zeros((4, 1), int), label_smoothing=1.0, class_weights=jnp.ones(2), focal_gamma=-1.0
        )
    text = str(caught.value)
    for part in ("4 problem(s)", "int32[4, 1]", "label_smoothing=1.0", "class_weights", "focal_gamma=-1.0"):
        assert part in text


def test_weight_of_the_wrong_length():
    with pytest.raises(JaxdlError, match=r"weight has shape \(3,\); it must be the first axes"):
        losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(4, int), jnp.ones(3))


def test_compute_dtype_reaches_the_model_and_not_the_weights():
    seen = {}

    def loss_fn(params, extra, batch, rng):
        seen.update({"w": params["w"].dtype, "x": batch["x"].dtype, "weight": batch["weight"].dtype})
        out = losses.squared_error(batch["x"] * params["w"], batch["y"], batch["weight"])
        return losses.LossOut(*out, {}, {"mean": extra["mean"] + 1})

    half = losses.with_compute_dtype(loss_fn, jnp.bfloat16)
    batch = {"x": jnp.ones(4), "y": jnp.zeros(4), "weight": jnp.ones(4), "id": jnp.arange(4)}
    out = half({"w": jnp.ones(())}, {"mean": jnp.zeros(())}, batch, None)
    assert seen == {"w": jnp.bfloat16, "x": jnp.bfloat16, "weight": jnp.float32}
    assert out.extra["mean"].dtype == jnp.float32
    assert out.total.dtype == jnp.float32
