"""The contrastive losses against NumPy in float64, their weights and groups, and their dependence on the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import JaxdlError
from jaxdl.contrastive import contrast, equal_rows, info_nce, sigmoid_pairs
from jaxdl.losses import LossOut
from jaxdl.models.clip import Contrast

N = 7
LOGITS = np.random.default_rng(0).normal(size=(N, N)) * 2
GROUPS = np.array([0, 1, 0, 3, 1, 5, 0])
WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 0.0, 3.0])


def numpy_info_nce(logits, weight, groups):
    """Pair by pair, over rows of positive weight."""
    total, rows = 0.0, [i for i in range(N) if weight[i] > 0]
    for i in rows:
        same = [j for j in rows if groups[j] == groups[i]]
        by_image = np.log(sum(np.exp(logits[i, j]) for j in rows)) - np.mean([logits[i, j] for j in same])
        by_text = np.log(sum(np.exp(logits[j, i]) for j in rows)) - np.mean([logits[j, i] for j in same])
        total += weight[i] * (by_image + by_text) / 2
    return total


def numpy_sigmoid(logits, weight, groups):
    total, rows = 0.0, [i for i in range(N) if weight[i] > 0]
    for i in rows:
        for j in rows:
            sign = 1 if groups[i] == groups[j] else -1
            total += weight[i] * np.log1p(np.exp(-sign * logits[i, j]))
    return total


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize(("loss_fn", "oracle"), [(info_nce, numpy_info_nce), (sigmoid_pairs, numpy_sigmoid)])
def test_against_numpy(loss_fn, oracle, weight, groups):
    given = {} if groups is None else {"groups": jnp.asarray(groups)}
    total, n = loss_fn(jnp.asarray(LOGITS, jnp.float32), None if weight is None else jnp.asarray(weight), **given)
    weight, groups = np.ones(N) if weight is None else weight, np.arange(N) if groups is None else groups
    np.testing.assert_allclose(total, oracle(LOGITS, weight, groups), rtol=1e-5)
    assert float(n) == weight.sum()


@pytest.mark.parametrize("loss_fn", [info_nce, sigmoid_pairs])
def test_padding_rows_change_nothing_and_get_no_gradient(loss_fn):
    logits, groups = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(GROUPS)
    keep = np.array([0, 1, 2, 4, 6])
    alone = loss_fn(logits[np.ix_(keep, keep)], jnp.asarray(WEIGHT[keep]), groups=groups[keep])
    padded = loss_fn(logits, jnp.asarray(WEIGHT), groups=groups)
    np.testing.assert_allclose(alone.total, padded.total, rtol=1e-6)
    gradient = jax.grad(lambda x: loss_fn(x, jnp.asarray(WEIGHT), groups=groups).total)(logits)
    lost = np.array([3, 5])
    assert not gradient[lost].any()
    assert not gradient[:, lost].any()
    assert bool(jnp.abs(gradient[np.ix_(keep, keep)]).min() > 0)


@pytest.mark.parametrize("loss_fn", [info_nce, sigmoid_pairs])
def test_a_batch_of_padding_is_zero(loss_fn):
    total, weight = loss_fn(jnp.asarray(LOGITS, jnp.float32), jnp.zeros(N))
    assert (float(total), float(weight)) == (0.0, 0.0)


def test_equal_captions_are_not_pushed_apart():
    """Rows 0 and 1 have one caption: at equal scores of the two, nothing pulls between them."""
    logits = jnp.array([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    grouped = jax.grad(lambda x: info_nce(x, groups=jnp.array([0, 0, 2])).total)(logits)
    np.testing.assert_allclose(grouped[0, 0], grouped[0, 1], rtol=1e-6)
    apart = jax.grad(lambda x: info_nce(x).total)(logits)
    assert float(apart[0, 1]) > 0 > float(grouped[0, 1])


def test_at_the_end_the_loss_is_the_entropy_of_the_targets():
    groups = jnp.array([0, 0, 2, 3])
    logits = jnp.where(groups[:, None] == groups[None], 50.0, 0.0)
    np.testing.assert_allclose(info_nce(logits, groups=groups).total, 2 * np.log(2), rtol=1e-6)


def test_microbatches_are_another_loss():
    logits = jnp.asarray(LOGITS[:6, :6], jnp.float32)
    halves = sum(float(info_nce(logits[i : i + 3, i : i + 3]).total) for i in (0, 3))
    assert halves < 0.9 * float(info_nce(logits).total)


def test_equal_rows():
    tokens = jnp.array([[1, 2, 0], [1, 2, 3], [1, 2, 0], [4, 0, 0], [1, 2, 3]])
    assert equal_rows(tokens).tolist() == [0, 1, 0, 3, 1]


def test_the_objective_groups_equal_captions_and_counts_hits():
    tokens = jnp.array([[1, 2], [3, 4], [1, 2], [5, 6]])
    logits = jnp.array([[0.0, 1.0, 5.0, 9.0], [0.0, 5.0, 1.0, 0.0], [5.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 3.0]])
    batch = {"tokens": tokens, "weight": jnp.array([1.0, 1.0, 1.0, 0.0])}
    out = contrast()(Contrast(None, None, logits), batch)
    assert isinstance(out, LossOut)
    expected = info_nce(logits, batch["weight"], groups=jnp.array([0, 1, 0, 3]))
    assert (float(out.total), float(out.weight)) == (float(expected.total), 3.0)
    assert out.sums["text_accuracy"].finish() == 1.0  # by text 2 for image 0, and text 0 for image 2: the same caption
    assert out.sums["image_accuracy"].finish() == 1.0


def test_all_problems_at_once():
    with pytest.raises(JaxdlError, match="3 problem") as error:
        info_nce(jnp.zeros((2, 3)), jnp.ones(5), groups=jnp.zeros((2, 1), int))
    assert "(2, 3)" in str(error.value)
    with pytest.raises(JaxdlError, match="nearest: info_nce"):
        contrast(loss="infonce")
