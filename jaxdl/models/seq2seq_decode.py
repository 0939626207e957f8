"""Decoding: the most probable continuation, token by token (greedy) or among the best few (beam search).

Dimensions: `B` rows, `W` beams, `N` = B x W hypotheses, `T` steps, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.errors import JaxdlError
from jaxdl.models.checks import check, count_problem
from jaxdl.models.seq2seq import Seq2Seq
from jaxdl.models.seq2seq_attention import Memory
from jaxdl.paths import Tree

StepFn = Callable[[Tree, Array, Tree], tuple[Array, Tree]]


class Decoded(NamedTuple):
    """Hypotheses, the best first.

    Attributes:
      tokens: (B, W, T) int32, ended by `eos`, then `pad`.
      scores: (B, W) float32, the log-probability over the length penalty; -inf where there are fewer than W.
    """

    tokens: Array
    scores: Array


class _Search(NamedTuple):
    step: Array
    tokens: Array  # (B, W, T) of the hypotheses that go on
    log_probs: Array  # (B, W)
    states: Tree
    ended_tokens: Array  # (B, W, T)
    ended_scores: Array  # (B, W)


def beam_search(
    step_fn: StepFn,
    constants: Tree,
    states: Tree,
    *,
    n_rows: int,
    beam_width: int,
    max_length: int,
    bos: int,
    eos: int,
    pad: int = 0,
    length_penalty: float = 0.0,
) -> Decoded:
    """Keeps the `beam_width` most probable beginnings at each step; with 1 it is greedy decoding.

    A hypothesis ends when `eos` is among the best `beam_width` continuations of its row; a row is done when as many
    have ended. Those that never end are cut at `max_length`, and rank behind all that did. The score is
    `log p / ((5 + n) / 6)**length_penalty` for `n` tokens with `eos` (Wu et al. 2016, equation 14).

    Args:
      step_fn: `(constants, tokens_N, states) -> (log_probs_NV, states)`; the tokens of the step before, first `bos`.
      constants: tree of arrays with leading axis B, such as an encoded source.
      states: tree of arrays with leading axis B, such as the carry of a recurrent network.
      n_rows: B.
      beam_width: W, at least 1.
      max_length: T, the longest output, `eos` included.
      bos, eos, pad: tokens; `pad` fills up after `eos`.
      length_penalty: 0 for none; 1 and above favour long outputs.

    Raises:
      ModelError: widths, lengths or a penalty out of range.

    Example:
      >>> log_probs = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
      >>> def step_fn(constants, tokens, states):
      ...     return jnp.tile(log_probs[None], (tokens.shape[0], 1)), states
      >>> found = beam_search(step_fn, (), (), n_rows=1, beam_width=2, max_length=3, bos=0, eos=2)
      >>> found.tokens[0].tolist()
      [[2, 0, 0], [3, 2, 0]]
    """
    check(
        "beam_search",
        count_problem("beam_width", beam_width),
        count_problem("max_length", max_length),
        f"length_penalty={length_penalty} must not be negative." if length_penalty < 0 else None,
    )
    constants, states = jax.tree.map(lambda x: jnp.repeat(x, beam_width, 0), (constants, states))
    shape = (n_rows, beam_width)
    no_tokens, nothing = jnp.full((*shape, max_length), pad, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)
    start = _Search(jnp.int32(0), no_tokens, nothing.at[:, 0].set(0.0), states, no_tokens, nothing)

    def goes_on(search: _Search) -> Array:
        return (search.step < max_length) & ~jnp.all(_is_done(search))

    def advance(search: _Search) -> _Search:
        before = jnp.where(search.step == 0, bos, search.tokens[:, :, jnp.maximum(search.step - 1, 0)])
        log_probs_NV, states = step_fn(constants, before.reshape(-1), search.states)
        return _advance(search, log_probs_NV.reshape(*shape, -1), states, eos, length_penalty)

    search = jax.lax.while_loop(goes_on, advance, start)
    return _rank(search, max_length, length_penalty)


def _is_done(search: _Search) -> Array:
    return jnp.all(search.ended_scores > -jnp.inf, 1)


def _advance(search: _Search, log_probs_BWV: Array, states: Tree, eos: int, length_penalty: float) -> _Search:
    n_rows, width, n_tokens = log_probs_BWV.shape
    totals = search.log_probs[..., None] + log_probs_BWV.astype(jnp.float32)
    n_kept = min(2 * width, width * n_tokens)  # at most `width` of them are `eos`, one a beam
    best_BK, where_BK = jax.lax.top_k(totals.reshape(n_rows, -1), n_kept)
    beam_BK, token_BK = where_BK // n_tokens, (where_BK % n_tokens).astype(jnp.int32)
    tokens_BKT = jnp.take_along_axis(search.tokens, beam_BK[..., None], 1).at[:, :, search.step].set(token_BK)
    is_end_BK, is_open = token_BK == eos, ~_is_done(search)

    counts_BK = is_end_BK & (jnp.arange(n_kept) < width)[None] & is_open[:, None]
    scores_BK = jnp.where(counts_BK, best_BK / _penalty(search.step + 1, length_penalty), -jnp.inf)
    ended_tokens, ended_scores = _best(
        jnp.concatenate([search.ended_tokens, tokens_BKT], 1),
        jnp.concatenate([search.ended_scores, scores_BK], 1),
        width,
    )
    kept_BW, chosen_BW = jax.lax.top_k(jnp.where(is_end_BK, -jnp.inf, best_BK), width)
    rows_N = (jnp.arange(n_rows)[:, None] * width + jnp.take_along_axis(beam_BK, chosen_BW, 1)).reshape(-1)
    return _Search(
        search.step + 1,
        jnp.take_along_axis(tokens_BKT, chosen_BW[..., None], 1),
        kept_BW,
        jax.tree.map(lambda x: x[rows_N], states),
        ended_tokens,
        ended_scores,
    )


def _penalty(n: Array | int, length_penalty: float) -> Array:
    return ((5.0 + jnp.asarray(n, jnp.float32)) / 6.0) ** length_penalty


def _best(tokens_BKT: Array, scores_BK: Array, width: int) -> tuple[Array, Array]:
    scores_BW, chosen_BW = jax.lax.top_k(scores_BK, width)
    return jnp.take_along_axis(tokens_BKT, chosen_BW[..., None], 1), scores_BW


def _rank(search: _Search, max_length: int, length_penalty: float) -> Decoded:
    """Those that ended, then those that were cut."""
    cut = search.log_probs / _penalty(max_length, length_penalty)
    tokens = jnp.concatenate([search.ended_tokens, search.tokens], 1)
    scores = jnp.concatenate([search.ended_scores, cut], 1)
    has_ended = jnp.arange(scores.shape[1])[None] < search.ended_scores.shape[1]
    order = jnp.lexsort((-scores, ~(has_ended & (scores > -jnp.inf))))[:, : search.tokens.shape[1]]
    tokens, scores = jnp.take_along_axis(tokens, order[..., None], 1), jnp.take_along_axis(scores, order, 1)
    return Decoded(tokens, scores)


def greedy_search(
    step_fn: StepFn, constants: Tree, states: Tree, *, n_rows: int, max_length: int, bos: int, eos: int, pad: int = 0
) -> Array:
    """The most probable token at each step, until `eos`; arguments as for `beam_search`.

    Returns:
      (B, T) int32 tokens, ended by `eos`, then `pad`.

    Example:
      >>> def step_fn(constants, tokens, states):
      ...     return jax.nn.one_hot(tokens + 1, 4), states
      >>> greedy_search(step_fn, (), (), n_rows=1, max_length=5, bos=0, eos=3).tolist()
      [[1, 2, 3, 0, 0]]
    """
    check("greedy_search", count_problem("max_length", max_length))

    def advance(carry: tuple[Array, Array, Array, Array, Tree]) -> tuple[Array, Array, Array, Array, Tree]:
        step, before, is_done, tokens, states = carry
        log_probs, states = step_fn(constants, before, states)
        token = jnp.where(is_done, pad, jnp.argmax(log_probs, -1).astype(jnp.int32))
        return step + 1, token, is_done | (token == eos), tokens.at[:, step].set(token), states

    first = jnp.full(n_rows, bos, jnp.int32)
    start = (jnp.int32(0), first, jnp.zeros(n_rows, bool), jnp.full((n_rows, max_length), pad, jnp.int32), states)
    return jax.lax.while_loop(lambda carry: (carry[0] < max_length) & ~jnp.all(carry[2]), advance, start)[3]


def make_translator(
    model: Seq2Seq,
    *,
    max_length: int,
    bos: int,
    eos: int,
    pad: int = 0,
    beam_width: int = 1,
    length_penalty: float = 0.0,
) -> Callable[..., Array]:
    """Makes a jitted `(variables, source_BS, lengths_B) -> tokens_BT`, compiled once for each shape.

    Args:
      model: the network.
      max_length: T, the longest output, `eos` included.
      bos, eos, pad: tokens of the target.
      beam_width: 1 is greedy.
      length_penalty: as for `beam_search`.

    Raises:
      JaxdlError: tokens outside the target's vocabulary; ModelError: lengths and widths out of range.

    Example:
      >>> model = Seq2Seq(source_vocab_size=7, target_vocab_size=5, width=8, embed_width=4)
      >>> source, lengths = jnp.array([[3, 4, 6, 0]]), jnp.array([3])
      >>> variables = model.init(jax.random.key(0), source, previous=source % 5, lengths=lengths)
      >>> make_translator(model, max_length=6, bos=1, eos=2, beam_width=3)(variables, source, lengths).shape
      (1, 6)
    """
    tokens = {"bos": bos, "eos": eos, "pad": pad}
    outside = [
        f"{name}={value} is no token; take one of 0..{model.target_vocab_size - 1}."
        for name, value in tokens.items()
        if not 0 <= value < model.target_vocab_size
    ]
    if outside:
        raise JaxdlError.listing("make_translator", outside)
    limits: dict[str, Any] = {"max_length": max_length, **tokens}

    @jax.jit
    def translate(variables: Tree, source_BS: Array, lengths_B: Array) -> Array:
        encoded: Any = model.apply(variables, source_BS, lengths=lengths_B, method=Seq2Seq.encode)
        memory, n_rows = encoded[0], source_BS.shape[0]

        def step_fn(memory: Memory, tokens_N: Array, states: Tree) -> tuple[Array, Tree]:
            decoded: Any = model.apply(variables, tokens_N[:, None], memory, _swap(states), method=Seq2Seq.decode)
            return jax.nn.log_softmax(decoded[0][:, 0]), _swap(decoded[1])

        states = _swap(encoded[1])
        if beam_width == 1:
            return greedy_search(step_fn, memory, states, n_rows=n_rows, **limits)
        search = beam_search(
            step_fn, memory, states, n_rows=n_rows, beam_width=beam_width, length_penalty=length_penalty, **limits
        )
        return search.tokens[:, 0]

    return translate


def _swap(states: Tree) -> Tree:
    """(L, N, D) as a recurrent stack has them, to (N, L, D) as the searches do; and back."""
    return tuple(jnp.swapaxes(state, 0, 1) for state in states)
