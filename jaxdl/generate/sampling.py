"""What a sampler does to logits before it draws: pure functions, each (B, V) -> (B, V).

Dimensions: `B` rows, `V` vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Sampling(NamedTuple):
    """How the next token is chosen; None leaves a filter out. Numbers may be traced, but for `top_k`.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token, and the filters below it are idle.
      top_k, top_p, min_p: see the functions of these names.
      repetition_penalty: see `penalize_repetition`.
    """

    temperature: Array | float = 0.0
    top_k: int | None = None
    top_p: Array | float | None = None
    min_p: Array | float | None = None
    repetition_penalty: Array | float | None = None


def choose(logits_BV: Array, rng: Array, sampling: Sampling, seen_BV: Array | None, *, is_greedy: bool) -> Array:
    """The next token of each row: (B,) int32.

    Filters apply in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
      logits_BV: float.
      rng: typed key.
      sampling: the settings.
      seen_BV: bool, the tokens of the prompt and those chosen so far; only for a repetition penalty.
      is_greedy: the most likely token; static, where a temperature may be traced.

    Example:
      >>> choose(jnp.array([[0.0, 9.0]]), jax.random.key(0), Sampling(), None, is_greedy=True).tolist()
      [1]
    """
    if sampling.repetition_penalty is not None and seen_BV is not None:
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if is_greedy:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    return jax.random.categorical(rng, filter_logits(logits_BV, sampling), axis=-1).astype(jnp.int32)


def filter_logits(logits_BV: Array, sampling: Sampling) -> Array:
    """Temperature, then top-k, top-p and min-p; what is filtered out becomes minus infinity.

    Example:
      >>> filter_logits(jnp.array([[0.0, 1.0, 2.0]]), Sampling(temperature=0.5, top_k=2)).tolist()
      [[-inf, 2.0, 4.0]]
    """
    logits_BV = logits_BV / jnp.asarray(sampling.temperature, logits_BV.dtype)
    if sampling.top_k is not None:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = min_p(logits_BV, sampling.min_p)
    return logits_BV


def penalize_repetition(logits_BV: Array, seen_BV: Array, penalty: Array | float) -> Array:
    """Divides positive logits of tokens that were seen by the penalty, multiplies negative ones (Keskar et al. 2019).

    Args:
      logits_BV: float.
      seen_BV: bool.
      penalty: above 1 discourages.

    Example:
      >>> penalize_repetition(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), 2.0).tolist()
      [[1.0, -4.0, 2.0]]
    """
    penalty = jnp.asarray(penalty, logits_BV.dtype)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def top_k(logits_BV: Array, k: int) -> Array:
    """Keeps the k largest logits, and those equal to the smallest of them (Fan et al. 2018).

    Args:
      logits_BV: float.
      k: at least 1, static; beyond V it keeps all.

    Example:
      >>> top_k(jnp.array([[1.0, 3.0, 2.0]]), 1).tolist()
      [[-inf, 3.0, -inf]]
    """
    least_B1 = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def top_p(logits_BV: Array, p: Array | float) -> Array:
    """Keeps the smallest set of most likely tokens whose probabilities reach p (Holtzman et al. 2020).

    Tokens as likely as the least likely of them stay too, and the likeliest always does.

    Args:
      logits_BV: float.
      p: in (0, 1].

    Example:
      >>> jnp.isfinite(top_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.6)).tolist()
      [[True, True, False]]
    """
    sorted_BV = jnp.sort(logits_BV, axis=-1)
    is_out_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, -1), -1) <= 1 - jnp.asarray(p, logits_BV.dtype)
    n_out_B1 = jnp.minimum(jnp.sum(is_out_BV, -1, keepdims=True), logits_BV.shape[-1] - 1)
    return jnp.where(logits_BV < jnp.take_along_axis(sorted_BV, n_out_B1, -1), -jnp.inf, logits_BV)


def min_p(logits_BV: Array, p: Array | float) -> Array:
    """Keeps the tokens at least p times as likely as the likeliest (Nguyen et al. 2024).

    Args:
      logits_BV: float.
      p: in [0, 1].

    Example:
      >>> jnp.isfinite(min_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.5)).tolist()
      [[True, True, False]]
    """
    probability_BV = jax.nn.softmax(logits_BV, -1)
    least_B1 = jnp.asarray(p, logits_BV.dtype) * jnp.max(probability_BV, -1, keepdims=True)
    return jnp.where(probability_BV < least_B1, -jnp.inf, logits_BV)
