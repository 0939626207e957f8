"""Attention and positions against loops in NumPy float64 and closed forms."""

import itertools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.choices import tell
from jaxdl.models import ModelError, attention
from jaxdl.models.attention import Sight, attend
from jaxdl.models.positions import Rotary, alibi_slopes, distances, relative_buckets, rotate, sinusoids

RNG = np.random.default_rng(0)


def loop_attend(q, k, v, sees, *, scale, bias=None, softcap=None):
    """One query, one head, one key at a time."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                scores = []
                for s in range(k.shape[1]):
                    score = scale * sum(q[b, t, h, i] * k[b, s, g, i] for i in range(q.shape[-1]))
                    score = softcap * math.tanh(score / softcap) if softcap else score
                    score += 0.0 if bias is None else bias[h, t, s]
                    scores.append(math.exp(score) if sees(b, t, s) else 0.0)
                out[b, t, h] = sum(p * v[b, s, g] for s, p in enumerate(scores)) / sum(scores)
    return out


def everything(b, t, s):
    return True


VARIANTS = {
    "all": ({}, everything),
    "causal": ({"is_causal": True}, lambda b, t, s: s <= t),
    "window": ({"window": 2}, lambda b, t, s: abs(s - t) < 2),
    "causal window": ({"is_causal": True, "window": 3}, lambda b, t, s: 0 <= t - s < 3),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_groups", [1, 2, 4], ids=["multi-query", "grouped", "multi-head"])
def test_attention_is_the_loop(variant, n_groups):
    options, sees = VARIANTS[variant]
    q, (k, v) = RNG.standard_normal((2, 5, 4, 3)), RNG.standard_normal((2, 2, 5, n_groups, 3))
    bias = RNG.standard_normal((4, 5, 5))
    sight = Sight(jnp.arange(5), jnp.arange(5))
    mask = sight.mask(**{"is_causal": False, "window": None, **options})
    with jax.enable_x64(True):
        ours = attend(*map(jnp.asarray, (q, k, v)), mask=mask, bias=jnp.asarray(bias)[None], scale=0.7, softcap=2.0)
    np.testing.assert_allclose(ours, loop_attend(q, k, v, sees, scale=0.7, bias=bias, softcap=2.0), rtol=1e-12)


def test_padding_and_documents_are_not_seen():
    q, k, v = RNG.standard_normal((3, 2, 4, 2, 3))
    key_mask, documents = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], bool), np.array([[1, 1, 2, 2], [1, 2, 2, 3]])
    sight = Sight(jnp.arange(4), jnp.arange(4), jnp.asarray(key_mask), jnp.asarray(documents), jnp.asarray(documents))
    with jax.enable_x64(True):
        mask = sight.mask(is_causal=False, window=None)
        ours = attend(*map(jnp.asarray, (q, k, v)), mask=mask, scale=1.0)
    theirs = loop_attend(q, k, v, lambda b, t, s: key_mask[b, s] and documents[b, t] == documents[b, s], scale=1.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_query_that_sees_nothing_gets_the_mean_and_no_nan():
    x = jnp.ones((1, 2, 1, 2))
    y, grad = jax.value_and_grad(lambda x: attend(x, x, x, mask=jnp.zeros((1, 1, 2, 2), bool), scale=1.0).sum())(x)
    assert float(y) == 4.0
    assert bool(jnp.isfinite(grad).all())


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("is_padded", [False, True])
def test_keys_beyond_a_block_of_queries_are_left_out_and_nothing_else(n_groups, is_padded, window, monkeypatch):
    """A sum over fewer keys is the same sum: what is left out had the weight 0."""
    monkeypatch.setattr(attention, "LEAST_BLOCK", 4)
    q, (k, v) = RNG.standard_normal((2, 16, 2, 3)), RNG.standard_normal((2, 2, 16, n_groups, 3))
    key_mask = jnp.arange(16)[None] >= jnp.array([[0], [5]]) if is_padded else None
    bias = jnp.asarray(RNG.standard_normal((1, 2, 16, 16)))
    sight, weight = Sight(jnp.arange(16), jnp.arange(16), key_mask), RNG.standard_normal((2, 16, 2, 3))
    weight = weight * (1 if key_mask is None else np.asarray(key_mask)[..., None, None])

    def loss(q, k, v, is_causal):
        mask = sight.mask(is_causal=True, window=window)
        return (attend(q, k, v, mask=mask, bias=bias, scale=0.7, is_causal=is_causal) * weight).sum()

    with jax.enable_x64(True):
        grads = [jax.value_and_grad(loss, (0, 1, 2))(*map(jnp.asarray, (q, k, v)), known) for known in (False, True)]
        made = jax.make_jaxpr(lambda q: loss(q, k, v, True))(jnp.asarray(q))
    assert str(made).count(" exp ") == attention.BLOCKS  # so many softmaxes: the blocks are really there
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *grads)


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 6), (1, 4))), ids=str)
@pytest.mark.parametrize("n_groups", [1, 3, 6])
def test_a_bias_in_rows_is_the_bias(shape, n_groups):
    b, h, t = shape
    bias = jnp.asarray(RNG.standard_normal((b, h, t, 5)))
    whole = jnp.broadcast_to(bias, (2, 6, 4, 5)).reshape(2, n_groups, 6 // n_groups * 4, 5)
    rows = attention._in_rows(bias, (2, 6, 4, 8), n_groups)
    np.testing.assert_array_equal(jnp.broadcast_to(rows, whole.shape), whole)


def test_heads_that_do_not_divide_and_an_impossible_implementation():
    x = jnp.ones((1, 2, 3, 4))
    with pytest.raises(ModelError, match="3 query heads do not divide over 2"):
        attend(x, x[:, :, :2], x[:, :, :2], scale=1.0)
    with pytest.raises(ModelError, match="the platform is cpu; float32 is neither"):
        attend(x, x, x, scale=1.0, implementation="cudnn")


def test_the_choice_is_logged_once(caplog):
    tell.cache_clear()
    x = jnp.ones((1, 2, 2, 4))
    with caplog.at_level(logging.INFO, "jaxdl"):
        for _ in range(2):
            attend(x, x, x, scale=1.0)
    assert caplog.messages == ["attention: xla (the platform is cpu)"]


def test_rotary_scores_depend_on_distance_only():
    q, k = jnp.asarray(RNG.standard_normal((2, 1, 1, 1, 8)), jnp.float32)

    def score(i, j):
        return float(jnp.sum(rotate(q, jnp.array([[i]]), Rotary()) * rotate(k, jnp.array([[j]]), Rotary())))

    assert score(3, 1) == pytest.approx(score(13, 11), rel=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_rotary_is_a_rotation_in_the_complex_plane():
    x = RNG.standard_normal((2, 5, 3, 6))
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    rotary = Rotary(theta=100.0, factor=2.0)
    angle = positions[..., None] * (100.0 ** (-np.arange(3) / 3) / 2.0)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)[:, :, None]
    with jax.enable_x64(True):
        ours = rotate(jnp.asarray(x), jnp.asarray(positions), rotary)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), rtol=1e-12)


def test_llama3_keeps_high_frequencies_and_stretches_low_ones():
    rotary = Rotary(theta=500_000.0, factor=8.0, kind="llama3")
    plain, scaled = Rotary(theta=500_000.0).frequencies(128), rotary.frequencies(128)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 8
    assert np.all(np.diff(scaled) < 0)


def test_alibi_slopes_of_no_power_of_two():
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_sinusoids():
    table = sinusoids(50, 8)
    assert table[7, 1] == pytest.approx(math.sin(7 / 10_000 ** (2 / 8)), rel=1e-6)
    assert table[7, 5] == pytest.approx(math.cos(7 / 10_000 ** (2 / 8)), rel=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_buckets_are_exact_near_and_shared_far(is_causal):
    distance = distances(jnp.arange(300), jnp.arange(300))
    buckets = np.asarray(relative_buckets(distance, n_buckets=32, max_distance=128, is_causal=is_causal))
    half = 32 if is_causal else 16
    assert buckets[:8, 0].tolist() == list(range(8))
    assert buckets[299, 0] == buckets[199, 0] == half - 1
    assert set(np.unique(buckets)) <= set(range(32))
    assert np.all(np.diff(buckets[:, 0]) >= 0)
    assert np.all(buckets[0, 1:] == 0) if is_causal else np.all(buckets[0, 1:] > 16)


def test_what_a_cpu_divides_late_is_a_softmax():
    scores = jnp.asarray([[[1e4, 1e4 - 1, -1e9], [-1e9, -1e9, -1e9], [0.5, -0.5, 3.0]]])
    weights, rate = attention._softmax(scores)
    assert rate is not None
    np.testing.assert_allclose(weights * rate, jax.nn.softmax(scores, axis=-1), rtol=1e-6)
