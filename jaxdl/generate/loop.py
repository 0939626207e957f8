"""The loop that draws token after token, all rows together, until each has stopped.

Dimensions: `B` rows, `T` prompt time, `N` new tokens, `V` vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.generate.calls import Calls
from jaxdl.generate.sampling import Sampling, choose
from jaxdl.models.block import Cache
from jaxdl.paths import Tree


class Plan(NamedTuple):
    """What is compiled for: a change here compiles anew.

    Attributes:
      calls: of the model.
      n_slots: room for new tokens.
      is_greedy: the most likely token, whatever the temperature.
      top_k: of the sampling.
    """

    calls: Calls
    n_slots: int
    is_greedy: bool
    top_k: int | None


class State(NamedTuple):
    """Where the rows stand.

    Attributes:
      n: int32, tokens drawn in each row, those after its end included.
      tokens: (B, N) int32.
      lengths: (B,) int32, tokens that count: up to the stop token, and with it.
      is_done: (B,) bool.
      seen: (B, V) bool, tokens read or drawn, or None where nobody asks.
      cache: the model's.
    """

    n: Array
    tokens: Array
    lengths: Array
    is_done: Array
    seen: Array | None
    cache: Cache


@functools.partial(jax.jit, static_argnames="plan")
def begin(
    params: Tree, tokens_BT: Array, mask_BT: Array, stops: Array, rng: Array, sampling: Sampling, *, plan: Plan
) -> State:
    """Reads the prompts and draws the first token of each.

    Args:
      params: of the model.
      tokens_BT: (B, T) int, padded on the left; `mask_BT` (B, T) bool is False there.
      mask_BT: see there.
      stops: (n,) int, tokens that end a row.
      rng: typed key.
      sampling: without `top_k`, which is the plan's.
      plan: static.

    Returns:
      The state with one token a row.
    """
    logits_BV, cache = plan.calls.start(params, tokens_BT, mask_BT, plan.n_slots)
    n_rows = len(tokens_BT)
    seen = None if sampling.repetition_penalty is None else plan.calls.seen(tokens_BT, mask_BT)
    empty = jnp.zeros((n_rows, plan.n_slots), jnp.int32)
    nobody = jnp.zeros(n_rows, bool)
    state = State(jnp.int32(0), empty, jnp.zeros(n_rows, jnp.int32), nobody, seen, cache)
    return _draw(state, logits_BV, stops, rng, sampling, plan)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def advance(
    params: Tree, state: State, limit: Array, stops: Array, rng: Array, sampling: Sampling, *, plan: Plan
) -> State:
    """Draws until each row has `limit` tokens or has stopped; other arguments as of `begin`."""

    def goes_on(state: State) -> Array:
        return (state.n < limit) & ~jnp.all(state.is_done)

    def step(state: State) -> State:
        last_B = jax.lax.dynamic_index_in_dim(state.tokens, state.n - 1, axis=1, keepdims=False)
        logits_BV, cache = plan.calls.next(params, last_B, state.cache)
        return _draw(state._replace(cache=cache), logits_BV, stops, rng, sampling, plan)

    return jax.lax.while_loop(goes_on, step, state)


def _draw(state: State, logits_BV: Array, stops: Array, rng: Array, sampling: Sampling, plan: Plan) -> State:
    """The token `n` of each row; its random numbers depend on the key and on n alone."""
    sampling = sampling._replace(top_k=plan.top_k)
    token_B = choose(logits_BV, jax.random.fold_in(rng, state.n), sampling, state.seen, is_greedy=plan.is_greedy)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token_B)), token_B].set(True)
    return state._replace(
        n=state.n + 1,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token_B[:, None], state.n, axis=1),
        lengths=jnp.where(state.is_done, state.lengths, state.n + 1),
        is_done=state.is_done | jnp.any(token_B[:, None] == stops[None], axis=1),
        seen=seen,
    )
