"""Durations against exact arithmetic, and what they refuse."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdl.config import Duration
from jaxdl.errors import JaxdlError


@pytest.mark.parametrize(
    ("text", "same", "written"),
    [
        (500, "500 steps", "500 steps"),
        ("500", "500 step", "500 steps"),
        ("1 steps", "1 step", "1 step"),
        ("10epochs", " 10  epochs ", "10 epochs"),
        ("1.0 epoch", "1 epochs", "1 epoch"),
        ("0.50 epochs", "0.5 epoch", "0.5 epochs"),
        ("60_000 examples", "6e4 examples", "60000 examples"),
        ("1.5e3 steps", "1500", "1500 steps"),
        ("100 epochs", "1e2 epochs", "100 epochs"),
    ],
)
def test_spellings_of_one_duration_are_equal_and_have_one_text(text, same, written):
    assert Duration(text) == Duration(same)
    assert hash(Duration(text)) == hash(Duration(same))
    assert str(Duration(text)) == str(Duration(same)) == written
    assert Duration(written) == Duration(text)
    assert repr(Duration(text)) == f"Duration({written!r})"


@pytest.mark.parametrize(
    "text", ["10 epoch s", "", "epochs", "-1 steps", "ten steps", "10 minutes", "1..5 epochs", "10%", "nan", "1e999"]
)
def test_garbage_is_refused_with_value_and_remedy(text):
    with pytest.raises(JaxdlError, match="is not a duration; write '500 steps'") as error:
        Duration(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("value", [True, 0.5, None, -1, b"1 step"])
def test_other_types_are_refused(value):
    with pytest.raises(JaxdlError, match="is not a duration"):
        Duration(value)


@pytest.mark.parametrize("text", ["0.5 steps", "1.5 examples", "2.5"])
def test_steps_and_examples_are_whole(text):
    with pytest.raises(JaxdlError, match="only epochs may be fractions"):
        Duration(text)


@pytest.mark.parametrize(
    ("text", "batch_size", "n_rows", "steps"),
    [
        ("7 steps", 128, 10, 7),
        ("1 epoch", 128, 60000, 469),
        ("2 epochs", 128, 60000, 938),  # rounded up once, not once an epoch: 937.5
        ("0.001 epochs", 128, 60000, 1),
        ("129 examples", 128, 60000, 2),
        ("128 examples", 128, 60000, 1),
        ("0 epochs", 128, 60000, 0),
        ("0.3 epochs", 3, 10, 1),  # in floats 0.3 * 10 / 3 = 1.0, but 0.7 * 10 / 7 is not
        ("1.1 epochs", 11, 10, 1),  # in floats 1.1 * 10 = 11.000000000000002
    ],
)
def test_steps_in_closed_form(text, batch_size, n_rows, steps):
    assert Duration(text).to_steps(batch_size, n_rows) == steps


@given(st.integers(1, 10**6), st.integers(0, 3), st.integers(1, 10**4), st.integers(1, 10**6))
def test_epochs_are_the_least_number_of_steps_that_covers_them(digits, n_decimals, batch_size, n_rows):
    text = f"{digits // 10**n_decimals}.{digits % 10**n_decimals:0{n_decimals}d}" if n_decimals else str(digits)
    steps = Duration(f"{text} epochs").to_steps(batch_size, n_rows)
    rows = Fraction(digits, 10**n_decimals) * n_rows
    assert steps * batch_size >= rows > (steps - 1) * batch_size
    assert steps >= 1


@given(st.integers(0, 10**12), st.sampled_from(["steps", "epochs", "examples"]))
def test_text_round_trip(amount, unit):
    assert Duration(str(Duration(f"{amount} {unit}"))) == Duration(f"{amount} {unit}")


@pytest.mark.parametrize(("batch_size", "n_rows"), [(0, 10), (10, 0), (0, 0), (-1, -1)])
def test_empty_batches_and_data_are_refused_together(batch_size, n_rows):
    with pytest.raises(JaxdlError) as error:
        Duration("1 epoch").to_steps(batch_size, n_rows)
    assert (f"batch_size={batch_size} must be at least 1" in str(error.value)) == (batch_size < 1)
    assert (f"n_rows={n_rows} must be at least 1" in str(error.value)) == (n_rows < 1)


def test_order_needs_one_unit():
    short, long = Duration("9 steps"), Duration("10 steps")
    assert short < long
    assert short <= long
    assert long > short
    assert not long < long
    assert max(short, long) == long
    assert Duration("10 epochs") != Duration("10 steps")
    with pytest.raises(JaxdlError, match="9 steps and 1 epoch have no order by themselves; compare their to_steps"):
        _ = short < Duration("1 epoch")
    with pytest.raises(TypeError):
        _ = short < 10


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Duration(5).amount = 6
