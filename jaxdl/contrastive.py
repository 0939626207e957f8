"""Losses over all pairs of a batch: symmetric InfoNCE (CLIP) and the sigmoid loss (SigLIP).

The loss of a row depends on the *whole batch*, whose other rows are its negatives. So these losses are not those of a
sum over rows: with microbatches each part is compared with itself only, which is another, easier task; the same holds
for `pmap` and `shard_map`, which show a device its own rows. Under `jit` with a sharded batch all rows are seen.

Dimensions: `B` rows, `T` tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdl.errors import JaxdlError
from jaxdl.losses import LossOut
from jaxdl.metrics import Mean, mean
from jaxdl.objectives import Objective
from jaxdl.paths import nearest

Array = jax.Array


def info_nce(logits_BB: Array, weight: Array | None = None, *, groups: Array | None = None) -> Mean:
    """The mean cross-entropy of finding each image's text and each text's image (Radford et al. 2021, figure 3).

    Two equal texts in a batch are no negatives of each other: which of the two belongs to the image cannot be known.
    With `groups`, the target of a row is spread evenly over all rows of its group, so that no pair of a group is
    pushed apart; the loss then ends at the entropy of the targets, not at 0.

    Args:
      logits_BB: (B, B) float, images by texts; row i and column i are a pair.
      weight: (B,) float or None. A row's loss counts by its weight; a row of weight 0 is padding, and is no negative of
        others either.
      groups: (B,) int; rows of one number are pairs of each other. None: each row is alone.

    Returns:
      The sums of `weight * (loss by images + loss by texts) / 2` in nats, and of `weight`.

    Raises:
      JaxdlError: shapes that do not fit.

    Example:
      >>> round(info_nce(jnp.zeros((4, 4))).finish(), 4)
      1.3863
      >>> round(info_nce(20 * jnp.eye(3), jnp.array([1.0, 1.0, 0.0])).finish(), 4)
      0.0
    """
    logits_BB, target_BB, is_real_B = _pairs(logits_BB, weight, groups)
    target_BB = target_BB / jnp.maximum(jnp.sum(target_BB, axis=1, keepdims=True), 1.0)  # symmetric: equal counts
    by_image, by_text = (_cross_entropy(x, target_BB, is_real_B) for x in (logits_BB, logits_BB.T))
    return mean((by_image + by_text) / 2, weight)


def _cross_entropy(logits_BB: Array, target_BB: Array, is_real_B: Array) -> Array:
    logits_BB = jnp.where(is_real_B[None], logits_BB, jnp.finfo(logits_BB.dtype).min)
    log_p_BB = jax.nn.log_softmax(logits_BB, axis=1)
    return -jnp.sum(jnp.where(target_BB > 0, target_BB * log_p_BB, 0.0), axis=1)


def sigmoid_pairs(logits_BB: Array, weight: Array | None = None, *, groups: Array | None = None) -> Mean:
    """Every pair as a binary decision, whether it belongs together (Zhai et al. 2023, SigLIP, algorithm 1).

    It needs a bias of the logits that starts low (`CLIP(bias_init=-10.0, scale_init=10.0)`), since nearly all pairs do
    not belong together.

    Args:
      logits_BB: (B, B) float, images by texts; row i and column i are a pair.
      weight: (B,) float or None, as in `info_nce`; it is the image's.
      groups: (B,) int or None; all pairs of one group belong together.

    Returns:
      The sums of `weight * loss`, where a row's loss is the sum over all texts, and of `weight`.

    Raises:
      JaxdlError: shapes that do not fit.

    Example:
      >>> round(sigmoid_pairs(jnp.zeros((2, 2))).finish(), 4)
      1.3863
    """
    logits_BB, target_BB, is_real_B = _pairs(logits_BB, weight, groups)
    sign_BB = jnp.where(target_BB > 0, 1.0, -1.0)
    return mean(jnp.sum(jnp.where(is_real_B[None], jax.nn.softplus(-sign_BB * logits_BB), 0.0), axis=1), weight)


def _pairs(logits_BB: Array, weight: Array | None, groups: Array | None) -> tuple[Array, Array, Array]:
    """Logits in float32 at least, 1 for pairs of real rows, and which rows are real."""
    n = logits_BB.shape[0]
    problems = [] if logits_BB.shape == (n, n) else [f"logits have shape {logits_BB.shape}; they must be (B, B)."]
    for name, x in (("weight", weight), ("groups", groups)):
        if x is not None and x.shape != (n,):
            problems.append(f"{name} has shape {x.shape}; it must be ({n},), a number a row.")
    if problems:
        raise JaxdlError.listing("contrastive loss", problems)
    dtype = jnp.promote_types(logits_BB.dtype, jnp.float32)
    is_real_B = jnp.ones(n, bool) if weight is None else weight > 0
    groups = jnp.arange(n) if groups is None else groups
    is_pair_BB = (groups[:, None] == groups[None]) & is_real_B[:, None] & is_real_B[None]
    return logits_BB.astype(dtype), is_pair_BB.astype(dtype), is_real_B


def equal_rows(tokens_BT: Array) -> Array:
    """Groups of equal texts: for each row, the number of the first row with the same tokens.

    Args:
      tokens_BT: (B, T) int, padded alike.

    Returns:
      (B,) int32.

    Example:
      >>> equal_rows(jnp.array([[1, 2], [3, 4], [1, 2]])).tolist()
      [0, 1, 0]
    """
    return jnp.argmax(jnp.all(tokens_BT[:, None] == tokens_BT[None], axis=-1), axis=1).astype(jnp.int32)


_LOSSES = {"info_nce": info_nce, "sigmoid": sigmoid_pairs}


def contrast(*, loss: str = "info_nce") -> Objective:
    """A contrastive loss of `CLIP`'s output, and how often the nearest text and the nearest image are right.

    Equal captions in `batch["tokens"]` are one group. `batch["weight"]` marks padding rows with 0.

    Args:
      loss: `info_nce` or `sigmoid`.

    Raises:
      JaxdlError: an unknown loss.

    Example:
      >>> from jaxdl.models.clip import Contrast
      >>> out = contrast()(Contrast(None, None, 9 * jnp.eye(2)), {"tokens": jnp.array([[1], [2]])})
      >>> out.sums["text_accuracy"].finish(), out.sums["image_accuracy"].finish()
      (1.0, 1.0)
    """
    if loss not in _LOSSES:
        raise JaxdlError(f"loss={loss!r} is unknown; nearest: {', '.join(nearest(loss, _LOSSES))}.")

    def objective(outputs: Any, batch: Mapping[str, Array]) -> LossOut:
        weight, groups = batch.get("weight"), equal_rows(batch["tokens"])
        total = _LOSSES[loss](outputs.logits, weight, groups=groups)
        hits = {"text_accuracy": outputs.logits, "image_accuracy": outputs.logits.T}
        return LossOut(*total, {name: _accuracy(logits, groups, weight) for name, logits in hits.items()})

    return objective


def _accuracy(logits_BB: Array, groups: Array, weight: Array | None) -> Mean:
    if weight is not None:
        logits_BB = jnp.where((weight > 0)[None], logits_BB, -jnp.inf)
    return mean((groups[jnp.argmax(logits_BB, axis=1)] == groups).astype(jnp.float32), weight)
