"""Attention: who sees whom, and the weighted sum, in the form that is fastest on the device.

Dimensions: `B` batch, `T` query time, `S` key time, `H` query heads, `G` key/value heads (H = G * R), `K` head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.choices import tell
from jaxdl.models.checks import ModelError
from jaxdl.models.positions import distances

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


class Sight(NamedTuple):
    """What decides which keys a query sees, shared by all layers.

    Attributes:
      query_slots: (T,) int, where the queries stand in the key axis.
      key_slots: (S,) int.
      key_mask: (B, S) bool, False for padding; None where all are real.
      query_documents, key_documents: (B, T) and (B, S) int; a query sees keys of its own document only. None: one.
    """

    query_slots: Array
    key_slots: Array
    key_mask: Array | None = None
    query_documents: Array | None = None
    key_documents: Array | None = None

    def mask(self, *, is_causal: bool, window: int | None) -> Array | None:
        """True where a query sees a key: (B or 1, 1, T or 1, S) bool, or None where it sees all.

        Args:
          is_causal: a query sees no key after it.
          window: a query sees only keys nearer than this many tokens, itself included.

        Example:
          >>> sight = Sight(jnp.arange(3), jnp.arange(3), jnp.array([[False, True, True]]))
          >>> sight.mask(is_causal=True, window=None)[0, 0].astype(int).tolist()
          [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
        """
        parts = []
        distance_TS = distances(self.query_slots, self.key_slots)
        if is_causal:
            parts.append((distance_TS >= 0)[None, None])
        if window is not None:
            parts.append((jnp.abs(distance_TS) < window)[None, None])
        if self.key_mask is not None:
            parts.append(self.key_mask[:, None, None, :].astype(bool))
        if self.query_documents is not None and self.key_documents is not None:
            parts.append(self.query_documents[:, None, :, None] == self.key_documents[:, None, None, :])
        return functools.reduce(jnp.logical_and, parts) if parts else None


def attend(
    query_BTHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float,
    softcap: float | None = None,
    dropout_fn: Any = None,
    implementation: str = "auto",
) -> Array:
    """Softmax attention (Vaswani et al. 2017, eq. 1), multi-, grouped- (Ainslie et al. 2023) or multi-query.

    Args:
      query_BTHK: queries; H must be a multiple of G.
      key_BSGK, value_BSGK: keys and values.
      mask: (B or 1, 1, T or 1, S) bool, True where a query sees a key. A query that sees nothing gets the mean of all.
      bias: (B or 1, H or 1, T, S), added to the scaled scores.
      scale: factor of the scores, usually `K ** -0.5`.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      dropout_fn: applied to the probabilities, (B, H, T, S).
      implementation: "xla", "cudnn" (flash attention on an NVIDIA GPU) or "auto", which says in the log what it took.

    Returns:
      (B, T, H, K), the dtype of the values.

    Raises:
      ModelError: heads that do not divide, or an implementation that cannot do what is asked.

    Example:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> attend(x, x, 5 * x, scale=0.5).shape, float(attend(x, x, 5 * x, scale=0.5)[0, 0, 0, 0])
      ((1, 3, 2, 4), 5.0)
    """
    n_heads, n_groups = query_BTHK.shape[2], key_BSGK.shape[2]
    if n_heads % n_groups:
        raise ModelError(f"{n_heads} query heads do not divide over {n_groups} key/value heads; use a multiple.")
    if _choose(implementation, query_BTHK, softcap, dropout_fn) == "cudnn":
        return jax.nn.dot_product_attention(
            query_BTHK, key_BSGK, value_BSGK, bias=bias, mask=mask, scale=scale, implementation="cudnn"
        )
    return _attend_xla(query_BTHK, key_BSGK, value_BSGK, mask, bias, scale, softcap, dropout_fn)


def _choose(implementation: str, query_BTHK: Array, softcap: float | None, dropout_fn: Any) -> str:
    head_size, dtype = query_BTHK.shape[-1], query_BTHK.dtype
    obstacles = [
        reason
        for reason, is_met in {
            f"the platform is {jax.default_backend()}": jax.default_backend() != "gpu",
            f"{dtype} is neither bfloat16 nor float16": dtype not in (jnp.bfloat16, jnp.float16),
            f"the head size {head_size} is no multiple of 8 up to 128": head_size % 8 != 0 or head_size > 128,
            "scores are soft-capped": softcap is not None,
            "probabilities are dropped out": dropout_fn is not None,
            "a single query": query_BTHK.shape[1] == 1,
        }.items()
        if is_met
    ]
    if implementation == "cudnn" and obstacles:
        raise ModelError(f"attention='cudnn' cannot be used: {'; '.join(obstacles)}. Use 'auto' or 'xla'.")
    choice = "xla" if obstacles or implementation == "xla" else "cudnn"
    reason = "asked for" if implementation != "auto" else obstacles[0] if obstacles else f"{dtype} on a GPU"
    tell("attention", choice, reason)
    return choice


def _attend_xla(
    query_BTHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    mask: Array | None,
    bias: Array | None,
    scale: float,
    softcap: float | None,
    dropout_fn: Any,
) -> Array:
    """One batched product over (B G, R T, K): XLA on a CPU runs it twice as fast as an einsum over BTHK."""
    (B, T, H, K), (S, G) = query_BTHK.shape, key_BSGK.shape[1:3]
    dtype = jnp.promote_types(query_BTHK.dtype, jnp.float32)
    query_NMK = jnp.swapaxes(query_BTHK * scale, 1, 2).reshape(B * G, H // G * T, K)
    key_NSK, value_NSK = (jnp.swapaxes(x, 1, 2).reshape(B * G, S, K) for x in (key_BSGK, value_BSGK))
    scores_NMS = jax.lax.dot_general(query_NMK, key_NSK, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)
    scores_BHTS = scores_NMS.reshape(B, H, T, S)
    if softcap is not None:
        scores_BHTS = softcap * jnp.tanh(scores_BHTS / softcap)
    if bias is not None:
        scores_BHTS = scores_BHTS + bias.astype(dtype)
    if mask is not None:
        scores_BHTS = jnp.where(mask, scores_BHTS, jnp.finfo(dtype).min)
    probabilities_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(value_BSGK.dtype)
    if dropout_fn is not None:
        probabilities_BHTS = dropout_fn(probabilities_BHTS)
    probabilities_NMS = probabilities_BHTS.reshape(B * G, H // G * T, S)
    mixed_NMK = jax.lax.dot_general(probabilities_NMS, value_NSK, (((2,), (1,)), ((0,), (0,))))
    return jnp.swapaxes(mixed_NMK.reshape(B, H, T, K), 1, 2)
