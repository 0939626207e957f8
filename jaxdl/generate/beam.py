"""Beam search, with the rules of transformers: finished hypotheses are kept apart from those that run on.

Dimensions: `B` rows, `T` prompt time, `N` new tokens, `V` vocabulary, `K` beams, `C` candidates of a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.generate.calls import Calls, take_rows
from jaxdl.models.block import Cache
from jaxdl.paths import Tree

NEVER = -1e9


class Beams(NamedTuple):
    """Where the search stands.

    Attributes:
      n: int32, tokens of every running beam.
      tokens: (B, K, N) int32, of the running beams, and `scores` (B, K) their log-likelihoods.
      scores: see there.
      done_tokens: (B, K, N), of the finished hypotheses; `done_scores` (B, K) with the length penalty, best first;
        `done_lengths` (B, K), 0 where there is none yet.
      done_scores, done_lengths: see there.
      is_open: (B,) bool, a running beam may still become better than a finished hypothesis.
      logits: (B K, V), of the next token.
      cache: the model's, of B K rows.
    """

    n: Array
    tokens: Array
    scores: Array
    done_tokens: Array
    done_scores: Array
    done_lengths: Array
    is_open: Array
    logits: Array
    cache: Cache


@functools.partial(jax.jit, static_argnames=("calls", "n_slots", "n_beams"))
def search(
    params: Tree,
    tokens_BT: Array,
    mask_BT: Array,
    stops: Array,
    limit: Array,
    length_penalty: Array,
    *,
    calls: Calls,
    n_slots: int,
    n_beams: int,
) -> tuple[Array, Array]:
    """The best hypothesis of each row.

    Args:
      params: of the model.
      tokens_BT: (B, T) int, padded on the left; `mask_BT` (B, T) bool is False there.
      mask_BT: see there.
      stops: (n,) int, tokens that end a hypothesis.
      limit: tokens of a hypothesis at most.
      length_penalty: scores are log-likelihoods over `length ** length_penalty`.
      calls, n_slots, n_beams: static: of the model, room for new tokens, K.

    Returns:
      `(tokens_BN, lengths_B)`.
    """
    n_rows = len(tokens_BT)
    logits_BV, cache = calls.start(params, tokens_BT, mask_BT, n_slots)
    rows = jnp.repeat(jnp.arange(n_rows), n_beams)
    empty = jnp.zeros((n_rows, n_beams, n_slots), jnp.int32)
    never = jnp.full((n_rows, n_beams), NEVER, jnp.float32)
    beams = Beams(
        n=jnp.int32(0),
        tokens=empty,
        scores=never.at[:, 0].set(0.0),  # all beams are equal at first: only one may branch
        done_tokens=empty,
        done_scores=never,
        done_lengths=jnp.zeros((n_rows, n_beams), jnp.int32),
        is_open=jnp.ones(n_rows, bool),
        logits=logits_BV[rows],
        cache=take_rows(cache, rows),
    )

    def goes_on(beams: Beams) -> Array:
        return (beams.n < limit) & jnp.any(beams.is_open)

    def step(beams: Beams) -> Beams:
        beams, last, parents = _extend(beams, stops, limit, length_penalty)
        logits, cache = calls.next(params, last, take_rows(beams.cache, parents))
        return beams._replace(logits=logits, cache=cache)

    beams = jax.lax.while_loop(goes_on, step, beams)
    return beams.done_tokens[:, 0], beams.done_lengths[:, 0]


def _extend(beams: Beams, stops: Array, limit: Array, length_penalty: Array) -> tuple[Beams, Array, Array]:
    """One more token a beam: the beams, the token of each (B K,), and the row of the cache it goes on from (B K,)."""
    (B, K), n_tokens = beams.scores.shape, beams.logits.shape[-1]
    n_candidates = max(2, 1 + len(stops)) * K  # so that K run on, however many stop
    likelihood_BKV = jax.nn.log_softmax(beams.logits.astype(jnp.float32), -1).reshape(B, K, n_tokens)
    totals_BKV = likelihood_BKV + beams.scores[:, :, None]
    scores_BC, index_BC = jax.lax.top_k(totals_BKV.reshape(B, K * n_tokens), n_candidates)
    parent_BC, token_BC = index_BC // n_tokens, index_BC % n_tokens
    tokens_BCN = _gather(beams.tokens, parent_BC)
    tokens_BCN = jax.lax.dynamic_update_slice_in_dim(tokens_BCN, token_BC[:, :, None], beams.n, axis=2)
    n = beams.n + 1
    ends_BC = jnp.any(token_BC[:, :, None] == stops.reshape(1, 1, -1), axis=-1) | (n >= limit)

    running_scores, running = jax.lax.top_k(jnp.where(ends_BC, scores_BC + NEVER, scores_BC), K)
    is_best_C = jnp.arange(n_candidates) < K
    is_final_BC = ends_BC & is_best_C[None] & beams.is_open[:, None]
    final_scores = jnp.where(is_final_BC, scores_BC / n.astype(jnp.float32) ** length_penalty, NEVER)
    beams = _finish(beams, tokens_BCN, final_scores, jnp.where(is_final_BC, n, 0))
    beams = beams._replace(n=n, tokens=_gather(tokens_BCN, running), scores=running_scores)
    beams = beams._replace(is_open=_still_open(beams, length_penalty))
    parents = _gather(parent_BC, running) + jnp.arange(B)[:, None] * K
    return beams, _gather(token_BC, running).reshape(B * K), parents.reshape(B * K)


def _finish(beams: Beams, tokens_BCN: Array, scores_BC: Array, lengths_BC: Array) -> Beams:
    """Keeps the K best of the hypotheses finished before and those finished now."""
    scores = jnp.concatenate([beams.done_scores, scores_BC], 1)
    best_scores, best = jax.lax.top_k(scores, beams.scores.shape[1])
    return beams._replace(
        done_scores=best_scores,
        done_tokens=_gather(jnp.concatenate([beams.done_tokens, tokens_BCN], 1), best),
        done_lengths=_gather(jnp.concatenate([beams.done_lengths, lengths_BC], 1), best),
    )


def _still_open(beams: Beams, length_penalty: Array) -> Array:
    """Whether the best running beam, were it to end now, would beat the worst finished hypothesis; (B,) bool."""
    best_B = beams.scores[:, 0] / beams.n.astype(jnp.float32) ** length_penalty
    worst_B = jnp.where(jnp.any(beams.done_lengths == 0, axis=1), NEVER, jnp.min(beams.done_scores, axis=1))
    return beams.is_open & (best_B > worst_B)


def _gather(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
