"""Standardising, filling and one-hot against NumPy; fitted on the training split and on nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import ArraySource, Pipeline, fit_fill_missing, fit_standardize, one_hot
from jaxdl.errors import JaxdlError


def source(n=5000, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (n, 4, 3, 3), dtype=np.uint8) // np.array([1, 2, 4], np.uint8)
    features = rng.normal(shift, [1, 1e-3, 1e4], (n, 3)) + np.array([0, 100, 1e6])
    return ArraySource({"image": image, "features": features, "target": features[:, 2]})


@pytest.mark.parametrize(
    ("key", "axis", "over"),
    [
        ("image", -1, (0, 1, 2)),
        ("features", -1, 0),
        ("image", (-3, -2, -1), 0),
        ("image", None, None),
        ("target", None, 0),
    ],
)
def test_statistics_equal_those_of_numpy(key, axis, over):
    train = source()
    fitted = fit_standardize(train, key, axis)
    values = train.arrays[key].astype(np.float64)
    np.testing.assert_allclose(fitted.mean, values.mean(over), rtol=1e-12)
    np.testing.assert_allclose(fitted.std, values.std(over), rtol=1e-9)
    assert fitted.mean.shape == np.mean(values, over).shape


def test_the_training_split_gets_mean_0_and_std_1_and_another_does_not():
    train, test = source(), source(seed=1, shift=2.0)
    standardize = fit_standardize(train, "features")
    ours, theirs = (part.map(standardize).arrays["features"].astype(np.float64) for part in (train, test))
    np.testing.assert_allclose(ours.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(ours.std(0), 1, atol=1e-5)
    assert abs(theirs.mean(0)[0] - 2) < 0.1
    assert ours.dtype == np.float64
    assert train.map(standardize).arrays["features"].dtype == np.float32


def test_one_transform_serves_example_batch_and_whole_source():
    train = source(50)
    standardize = fit_standardize(train, "image")
    whole = train.map(standardize).arrays["image"]
    data = Pipeline(train, 50, shuffle=False, transforms=[standardize])
    np.testing.assert_array_equal(data[0]["image"], whole)
    np.testing.assert_array_equal(standardize(train.take(np.arange(50)))["image"], whole)
    by_row = fit_standardize([train[row] for row in range(50)], "image")
    np.testing.assert_array_equal(by_row.mean, standardize.mean)


def test_the_input_is_left_alone():
    train = source(10)
    before = train.arrays["image"].copy()
    train.map(fit_standardize(train, "image"))
    np.testing.assert_array_equal(train.arrays["image"], before)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9, -3e-7])
def test_a_constant_column_becomes_0_and_stays_finite_on_test(constant):
    features = np.stack([np.full(3001, constant), np.arange(3001.0)], 1)
    standardize = fit_standardize(ArraySource({"features": features}), "features")
    out = standardize({"features": features})["features"]
    np.testing.assert_allclose(out[:, 0], 0, atol=1e-6)
    assert standardize.std[0] == 1
    assert standardize({"features": np.array([[constant + 2, 0.0]])})["features"][0, 0] == pytest.approx(2, rel=1e-6)


def test_a_nearly_constant_column_is_not_constant():
    column = 1e6 + np.tile([0.0, 1e-3], 500)
    out = fit_standardize(ArraySource({"x": column[:, None]}), "x")({"x": column[:, None]})["x"]
    np.testing.assert_allclose(out[:2, 0], [-1, 1], rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_inverse_undoes(values):
    target = np.array(values)
    fitted = fit_standardize(ArraySource({"target": target}), "target", None)
    back = fitted.inverse((target - fitted.mean) / fitted.std)
    np.testing.assert_allclose(back, target, atol=1e-6 * (1 + np.abs(target).max()))


def test_standardize_errors():
    with pytest.raises(JaxdlError, match="axis=0 must be negative"):
        fit_standardize(source(5), "image", 0)
    with pytest.raises(JaxdlError, match="no key 'images'; it has features, image, target"):
        fit_standardize(source(5), "images")
    holed = ArraySource({"x": np.array([[1.0], [np.nan]])}, check_finite=False)
    with pytest.raises(JaxdlError, match="x holds NaN"):
        fit_standardize(holed, "x")


NAN = np.nan
HOLED = np.array([[1.0, 10, NAN], [NAN, 20, 7], [4, 60, NAN], [4, 30, 8]])


@pytest.mark.parametrize(
    ("kwargs", "fill"),
    [({}, [3, 30, 7.5]), ({"strategy": "median"}, [4, 25, 7.5]), ({"strategy": "constant", "value": -1}, [-1, -1, -1])],
)
def test_missing_values_take_the_training_value(kwargs, fill):
    train = ArraySource({"features": HOLED}, check_finite=False)
    filler = fit_fill_missing(train, **kwargs)
    np.testing.assert_array_equal(filler.value, fill)
    np.testing.assert_array_equal(
        train.map(filler).arrays["features"], np.where(np.isnan(HOLED), np.array(fill), HOLED).astype(np.float32)
    )
    test = filler({"features": np.full((1, 3), NAN)})
    np.testing.assert_array_equal(test["features"], [fill])


def test_nothing_is_added_unless_asked_and_then_only_where_training_rows_miss():
    train = ArraySource({"features": HOLED}, check_finite=False)
    assert train.map(fit_fill_missing(train)).arrays["features"].shape == (4, 3)
    flagged = fit_fill_missing(train, indicator=True)
    out = train.map(flagged).arrays["features"]
    np.testing.assert_array_equal(out[:, 3:], np.isnan(HOLED[:, [0, 2]]))
    np.testing.assert_array_equal(flagged({"features": HOLED[1]})["features"], [3, 20, 7, 1, 0])


def test_fill_errors():
    empty = ArraySource({"features": np.array([[1.0, NAN], [2.0, NAN]])}, check_finite=False)
    with pytest.raises(JaxdlError, match="features column 1 is missing in every training row, so it has no mean"):
        fit_fill_missing(empty)
    assert fit_fill_missing(empty, strategy="constant").value.tolist() == [0, 0]
    with pytest.raises(JaxdlError, match="strategy='mode'"):
        fit_fill_missing(empty, strategy="mode")


def test_one_hot_of_example_and_batch():
    labels = np.array([[0, 2], [1, 1]], np.int32)
    hot = one_hot(3)({"label": labels, "x": 1})
    np.testing.assert_array_equal(hot["label"].argmax(-1), labels)
    np.testing.assert_array_equal(hot["label"].sum(-1), 1)
    assert (hot["label"].dtype, hot["x"]) == (np.float32, 1)
    assert one_hot(3)({"label": np.int32(1)})["label"].tolist() == [0, 1, 0]
    with pytest.raises(JaxdlError, match=r"label -1 at row 1 is not in 0\.\.2"):
        one_hot(3)({"label": np.array([0, -1])})
