"""The order of the rows, splits and labels: every law here is exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.order import Order, batch_rng, example_rng, permutation
from jaxdl.data.splits import check_labels, split_rows
from jaxdl.errors import JaxdlError

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**64 - 1)


@settings(max_examples=80, deadline=None)
@given(n=sizes, batch=sizes, seed=seeds, shuffle=st.booleans())
def test_every_row_comes_exactly_once_an_epoch(n, batch, seed, shuffle):
    order = Order(n, batch, seed, shuffle)
    n_steps = -(-3 * n // batch)
    stream = np.concatenate([order.rows(step) for step in range(n_steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(n=sizes, batch=sizes, seed=seeds, step=st.integers(0, 40))
def test_random_access_equals_walking_and_the_definition(n, batch, seed, step):
    walked = Order(n, batch, seed)
    for earlier in range(step):
        walked.rows(earlier)
    fresh = Order(n, batch, seed).rows(step)
    positions = [step * batch + j for j in range(batch)]
    defined = [permutation(n, seed, p // n)[p % n] for p in positions]
    assert fresh.tolist() == walked.rows(step).tolist() == defined
    assert fresh.dtype == np.int64
    assert fresh.shape == (batch,)


def test_epochs_and_seeds_differ():
    epochs = {tuple(permutation(50, 3, epoch)) for epoch in range(20)}
    seeds = {tuple(permutation(50, seed, 0)) for seed in range(20)}
    assert len(epochs) == len(seeds) == 20


def test_a_permutation_is_uniform():
    where_row_0_lands = [int(np.argmin(permutation(6, seed, 0))) for seed in range(3000)]
    counts = np.bincount(where_row_0_lands, minlength=6)
    assert (np.abs(counts - 500) < 5 * np.sqrt(500)).all()


def test_the_stream_is_the_same_under_every_numpy():
    """Frozen values: raw Philox words are promised never to change, and a resumed run relies on it."""
    assert permutation(8, 0, 0).tolist() == Order(8, 8).rows(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert Order(8, 8, seed=1).rows(2).tolist() == [7, 5, 4, 0, 3, 6, 1, 2]


def test_a_batch_larger_than_the_source_spans_epochs():
    order = Order(3, 8, seed=5)
    rows = np.concatenate([order.rows(step) for step in range(3)])
    assert [sorted(rows[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8


def test_a_far_step_costs_no_walk():
    assert Order(10, 4).rows(10**15).shape == (4,)


def test_only_two_epochs_are_kept():
    order = Order(10, 10)
    for step in range(9):
        order.rows(step)
    assert order._epoch_rows.cache_info().currsize == 2


def test_random_numbers_of_examples_batches_and_order_are_unrelated():
    draws = {fn(0, 5).random() for fn in (example_rng, batch_rng)} | {example_rng(1, 5).random()}
    assert len(draws) == 3
    many = np.array([example_rng(0, position).random() for position in range(4000)])
    assert abs(many.mean() - 0.5) < 5 / np.sqrt(12 * 4000)
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 5 / np.sqrt(4000)


def test_all_problems_of_an_order_come_at_once():
    with pytest.raises(JaxdlError, match=r"(?s)n_rows=0.*batch_size=0.*seed=-1"):
        Order(0, 0, -1)
    with pytest.raises(JaxdlError, match="step=-2 must be at least 0"):
        Order(3, 1).rows(-2)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=10, max_size=80),
    fraction=st.floats(0.1, 0.9),
    seed=seeds,
    stratify=st.booleans(),
)
def test_a_split_parts_the_rows(labels, fraction, seed, stratify):
    labels = np.array(labels)
    train, test = split_rows(labels, fraction, seed, stratify)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert len(test) == round(len(labels) * fraction)
    if stratify:
        for label in range(5):
            share = (labels == label).sum() * fraction
            assert abs((labels[test] == label).sum() - share) < 1


def test_a_split_depends_on_the_seed_and_on_nothing_else():
    one, again, other = (split_rows(100, 0.3, seed)[1].tolist() for seed in (0, 0, 1))
    assert one == again != other
    assert one != sorted(permutation(100, 0, 0)[:30].tolist())


@pytest.mark.parametrize(("n", "fraction"), [(3, 0.1), (3, 0.9), (10, 0.0), (10, 1.0), (10, -0.5), (0, 0.5)])
def test_no_side_of_a_split_may_be_empty(n, fraction):
    with pytest.raises(JaxdlError, match=f"fraction={fraction}"):
        split_rows(n, fraction)


def test_labels_out_of_range_are_named_with_row_and_range():
    check_labels(np.arange(3), 3)
    with pytest.raises(JaxdlError, match=r"label 3, 9 at row 1, 4 is not in 0\.\.2; .* n_classes to at least 10"):
        check_labels(np.array([0, 9, 1, 2, 3]), 3)
    with pytest.raises(JaxdlError, match=r"label -1 at row 0 is not in 0\.\.2; .* drop these rows"):
        check_labels(np.array([-1, 2]), 3)
    with pytest.raises(JaxdlError, match=r"at row 0, 1, 2, 3, 4 and 3 more"):
        check_labels(np.full(8, 7), 3)
    with pytest.raises(JaxdlError, match="dtype float64"):
        check_labels(np.array([0.0, 1.0]), 3)
