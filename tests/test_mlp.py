"""The multi-layer perceptron against NumPy, its options and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models import MLP, ModelError

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def init(model, x=X):
    return jax.jit(model.init)(jax.random.key(0), x)


@pytest.mark.parametrize("residual", [False, True])
def test_forward_is_the_formula_in_numpy(residual):
    model = MLP(widths=(4, 4, 4), n_outputs=2, activation="tanh", residual=residual)
    variables = init(model)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
    h = X.astype(np.float64)
    for i in range(3):
        y = np.tanh(h @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"])
        h = h + y if residual and i > 0 else y
    want = h @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(model.apply(variables, X), want, atol=1e-5)


def test_more_dimensions_are_flattened():
    model = MLP(widths=(4,), n_outputs=2)
    x = np.random.default_rng(1).normal(size=(3, 2, 5, 1)).astype(np.float32)
    variables = init(model, x)
    assert variables["params"]["dense_0"]["kernel"].shape == (10, 4)
    np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x.reshape(3, 10)))


def test_an_empty_batch_goes_through():
    model = MLP(widths=(4,), n_outputs=2)
    assert model.apply(init(model), X[:0]).shape == (0, 2)


@pytest.mark.parametrize("norm", ["none", "group", "layer", "batch"])
def test_bias_is_absent_exactly_before_a_norm(norm):
    variables = init(MLP(widths=(16, 8), n_outputs=2, norm=norm))
    assert ("bias" in variables["params"]["dense_0"]) == (norm == "none")
    assert ("norm_1" in variables["params"]) == (norm != "none")
    assert ("batch_stats" in variables) == (norm == "batch")


def test_dropout_needs_training_and_a_key():
    model = MLP(widths=(32,), n_outputs=2, dropout_rate=0.5)
    variables = init(model)
    calm = model.apply(variables, X)
    np.testing.assert_array_equal(calm, model.apply(variables, X, train=False, rngs={"dropout": jax.random.key(0)}))
    noisy = [model.apply(variables, X, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert (noisy[0] != noisy[2]).any()
    assert (noisy[0] != calm).any()


def test_low_precision_keeps_parameters_logits_and_gradients_in_float32():
    model = MLP(widths=(8, 8), n_outputs=2, dtype=jnp.bfloat16, norm="layer")
    variables = init(model)
    logits = model.apply(variables, X)
    gradients = jax.jit(jax.grad(lambda v: (model.apply(v, X) ** 2).sum()))(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits, gradients))} == {jnp.dtype("float32")}
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradients))
    exact = MLP(widths=(8, 8), n_outputs=2, norm="layer").apply(variables, X)
    assert 0 < jnp.abs(logits - exact).max() < 0.1


def test_it_learns_exclusive_or():
    x, label = jnp.array([[0.0, 0], [0, 1], [1, 0], [1, 1]]), jnp.array([0, 1, 1, 0])
    model = MLP(widths=(16,), n_outputs=2, activation="tanh")
    variables = init(model, x)

    def loss(v):
        return -jnp.take_along_axis(jax.nn.log_softmax(model.apply(v, x)), label[:, None], 1).mean()

    def descend(v, _):
        return jax.tree.map(lambda p, g: p - g, v, jax.grad(loss)(v)), loss(v)

    variables, losses = jax.jit(lambda v: jax.lax.scan(descend, v, length=300))(variables)
    assert losses[-1] < 0.05 < losses[0]
    assert (model.apply(variables, x).argmax(1) == label).all()


def test_all_problems_are_listed_at_construction():
    with pytest.raises(ModelError) as caught:
        MLP(widths=(), n_outputs=0, activation="rleu", dropout_rate=1.5, norm="gruop")
    message = str(caught.value)
    assert "MLP: 5 problem(s)" in message
    for part in ("widths=()", "n_outputs=0", "did you mean 'relu'", "dropout_rate=1.5", "did you mean 'group'"):
        assert part in message


@pytest.mark.parametrize("fields", [{"widths": 5}, {"widths": (4, -1)}, {"widths": (4, 8), "residual": True}])
def test_impossible_widths_are_refused(fields):
    with pytest.raises(ModelError, match="MLP: 1 problem"):
        MLP(n_outputs=1, **fields)


def test_inputs_that_are_no_float_batch_are_refused():
    model = MLP(widths=(4,), n_outputs=2)
    with pytest.raises(ModelError, match="uint8; scale them to floats"):
        init(model, np.zeros((2, 4), np.uint8))
    with pytest.raises(ModelError, match=r"shape \(5,\)"):
        init(model, X[0])
