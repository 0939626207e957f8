"""What logits say of a label, read as often as a device does best: on a CPU in simple passes, on a GPU in one.

A GPU reads the logits of a large vocabulary more slowly than it computes with them, and the separate reductions of a
loss and its accuracy are as many passes over them. Dimensions: B rows (any number of leading axes), C classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class LabelScores(NamedTuple):
    """Of each row.

    Attributes:
      log_z: (B...) float32, the log of the sum of exponentials of its logits.
      at_label: (B...) float32, the logit of its label.
      is_likeliest: (B...) bool, whether `argmax(logits) == label`, of equal logits the first; False where one is NaN.
    """

    log_z: Array
    at_label: Array
    is_likeliest: Array


def score_labels(logits_BC: Array, labels_B: Array) -> LabelScores:
    """Reads logits against integer labels; -1 is the last class, as everywhere in NumPy.

    Args:
      logits_BC: (B..., C) float; computed in float32.
      labels_B: (B...) int.

    Example:
      >>> scores = score_labels(jnp.array([[0.0, 0.0], [1.0, 3.0]]), jnp.array([1, 1]))
      >>> scores.log_z.round(2).tolist(), scores.at_label.tolist(), scores.is_likeliest.tolist()
      ([0.6899999976158142, 3.129999876022339], [0.0, 3.0], [False, True])
    """
    if jax.default_backend() == "gpu":
        return _in_one_pass(logits_BC, labels_B)
    at_label = _at_labels if jax.default_backend() == "cpu" else _at_labels_fused
    logits_BC = logits_BC.astype(jnp.float32)
    return LabelScores(
        jax.nn.logsumexp(logits_BC, -1), at_label(logits_BC, labels_B), _is_likeliest(logits_BC, labels_B)
    )


def _at_labels(logits_BC: Array, labels_B: Array) -> Array:
    return jnp.take_along_axis(logits_BC, labels_B[..., None], -1)[..., 0]


_at_labels_fused = jax.custom_jvp(_at_labels)


@_at_labels_fused.defjvp
def _at_labels_fused_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    """A gradient that XLA fuses: that of a gather copies all logits twice."""
    (logits_BC, labels_B), (change_BC, _) = primals, tangents
    return _at_labels(*primals), jnp.sum(jnp.where(_is_label(logits_BC, labels_B), change_BC, 0.0), -1)


def _is_label(logits_BC: Array, labels_B: Array) -> Array:
    return _classes(logits_BC) == _counted(logits_BC, labels_B)[..., None]


def _classes(logits_BC: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, logits_BC.shape, logits_BC.ndim - 1)


def _counted(logits_BC: Array, labels_B: Array) -> Array:
    """Labels counted from the first class, as a gather reads them."""
    return jnp.where(labels_B < 0, labels_B + logits_BC.shape[-1], labels_B)


def _is_likeliest(logits_BC: Array, labels_B: Array) -> Array:
    """In passes that are quick on a CPU, where `argmax` takes seven times as long."""
    counted_B1 = _counted(logits_BC, labels_B)[..., None].astype(jnp.float32)
    best_B1 = jnp.max(logits_BC, -1, keepdims=True)
    # Indices as floats, exact up to 2**24: comparing whole numbers would take half of what this saves.
    index_C = jnp.arange(logits_BC.shape[-1], dtype=jnp.float32).reshape((1,) * (logits_BC.ndim - 1) + (-1,))
    is_earlier_BC = (logits_BC == best_B1) & (index_C < counted_B1)
    is_best_B = _at_labels(logits_BC, labels_B) == best_B1[..., 0]
    return is_best_B & ~jnp.any(is_earlier_BC, -1)


# ---- one pass ----

_LEAST = np.finfo(np.float32).min
_MOST_CLASSES = 4096  # that XLA sums as one piece


@jax.custom_jvp
def _in_one_pass(logits_BC: Array, labels_B: Array) -> LabelScores:
    """The sum of exponentials relative to the largest logit so far (Milakov and Gimelshein 2018, algorithm 3)."""
    at_label_B = _at_labels(logits_BC, labels_B).astype(jnp.float32)
    wide_BC = logits_BC.astype(jnp.float32)
    own_B1 = at_label_B[..., None]
    is_earlier_BC = _classes(logits_BC) < _counted(logits_BC, labels_B)[..., None]
    beats_BC = wide_BC > jnp.where(is_earlier_BC, _just_below(own_B1), own_B1)  # of equals the first is the likeliest
    operands = (jnp.maximum(wide_BC, _LEAST), jnp.ones_like(wide_BC), beats_BC)  # of two -inf the difference is NaN
    starts = (jnp.asarray(_LEAST), jnp.asarray(0.0, jnp.float32), jnp.asarray(False))
    pieces = tuple(x.reshape(*x.shape[:-1], _n_pieces(x.shape[-1]), -1) for x in operands)
    best_BP, sum_BP, is_beaten_BP = lax.reduce(pieces, starts, _joined, (logits_BC.ndim,))
    best_B1 = jnp.max(best_BP, -1, keepdims=True)
    log_z_B = best_B1[..., 0] + jnp.log(jnp.sum(sum_BP * jnp.exp(best_BP - best_B1), -1))
    return LabelScores(log_z_B, at_label_B, ~(jnp.any(is_beaten_BP, -1) | jnp.isnan(log_z_B - at_label_B)))


def _just_below(x: Array) -> Array:
    """The float32 before; before 0 the first that a GPU does not take for 0."""
    return jnp.where(x == 0, -np.finfo(np.float32).tiny, jnp.nextafter(x, -jnp.inf))


def _n_pieces(n_classes: int) -> int:
    """In how many equal pieces to sum, of at most `_MOST_CLASSES` where that can be.

    Example:
      >>> _n_pieces(1000), _n_pieces(50304), _n_pieces(50257), _n_pieces(99991)
      (1, 16, 29, 1)
    """
    least = -(-n_classes // _MOST_CLASSES)
    return next((n for n in range(least, min(1024, n_classes) + 1) if n_classes % n == 0), 1)


def _joined(a: Any, b: Any) -> Any:
    (best_a, sum_a, is_beaten_a), (best_b, sum_b, is_beaten_b) = a, b
    smaller = jnp.exp(-jnp.abs(best_a - best_b))
    is_a = best_a >= best_b
    total = jnp.where(is_a, sum_a + sum_b * smaller, sum_a * smaller + sum_b)
    return jnp.maximum(best_a, best_b), total, is_beaten_a | is_beaten_b


@_in_one_pass.defjvp
def _in_one_pass_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[LabelScores, LabelScores]:
    (logits_BC, labels_B), (change_BC, _) = primals, tangents
    scores = _in_one_pass(logits_BC, labels_B)
    change_BC = change_BC.astype(jnp.float32)
    share_BC = jnp.exp(logits_BC.astype(jnp.float32) - scores.log_z[..., None])
    of_log_z_B = jnp.sum(share_BC * change_BC, -1)
    of_label_B = jnp.sum(jnp.where(_is_label(logits_BC, labels_B), change_BC, 0.0), -1)
    none: Any = np.zeros(scores.is_likeliest.shape, jax.dtypes.float0)
    return scores, LabelScores(of_log_z_B, of_label_B, none)
