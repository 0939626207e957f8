"""New tokens after prompts, from any language model with a cache."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.generate.beam import search
from jaxdl.generate.calls import Calls
from jaxdl.generate.loop import Plan, State, advance, begin
from jaxdl.generate.request import GenerateError, Options, bucket, check_request, pad_left
from jaxdl.generate.sampling import Sampling
from jaxdl.paths import Tree

STREAM_TOKENS = 4


def generate(
    model: nn.Module,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    n_beams: int = 1,
    length_penalty: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], Any] | None = None,
    start_token: int = 0,
) -> list[list[int]]:
    """Continues prompts of any lengths together.

    Prompts are padded on the left to a power of two, and there is room for a power of two of new tokens, so that one
    compilation serves all lengths up to those. Temperature, top-p, min-p, penalties and seed are not compiled in.

    Args:
      model: a language model: it has `hidden`, `logits` and `init_cache`. An encoder-decoder reads the prompts with its
        encoder.
      params: of the model.
      prompts: a list of tokens a row.
      max_new_tokens: of each row, at most.
      temperature: 0 takes the most likely token; else tokens are drawn at this temperature.
      top_k, top_p, min_p: filters of a drawing, see `jaxdl.generate.sampling`.
      repetition_penalty: above 1 discourages tokens that were there before, prompt included.
      stop_tokens: a row ends with the first of these.
      n_beams: above 1, beam search: the best of this many hypotheses that were followed together.
      length_penalty: beam search ranks by log-likelihood over `length ** length_penalty`.
      seed: of the drawing. Token n of all rows is a function of the seed, n and the logits.
      on_token: called with (row, token) as tokens come, a few steps at a time.
      start_token: what the decoder of an encoder-decoder reads first.

    Returns:
      The new tokens of each row; a row that stopped ends with its stop token.

    Raises:
      GenerateError: prompts that are empty, too long or not of the vocabulary, options out of range or that contradict
        each other: all in one message.

    Example:
      >>> from jaxdl.models.apply import init_model
      >>> from jaxdl.models.gpt2 import GPT2, gpt2_block
      >>> model = GPT2(gpt2_block(width=8, n_heads=2), n_layers=1, vocab_size=11, n_positions=32)
      >>> params, _ = init_model(model, jax.random.key(0), jnp.array([[1, 2]]))
      >>> [len(new) for new in generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5)]
      [5, 5]
    """
    options = Options(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop_tokens), n_beams,
        length_penalty, on_token, start_token,
    )  # fmt: skip
    calls = _calls(model, start_token)
    check_request(model, prompts, options, has_encoder=calls.has_encoder)
    length = bucket(max(map(len, prompts)), most=getattr(model, "n_positions", None))
    inputs = params, *pad_left(prompts, length), np.array(stop_tokens, np.int32)
    n_slots = bucket(max_new_tokens)
    if n_beams > 1:
        limits = np.int32(max_new_tokens), np.float32(length_penalty)
        tokens, lengths = search(*inputs, *limits, calls=calls, n_slots=n_slots, n_beams=n_beams)
        return _lists(tokens, lengths)
    penalty = None if repetition_penalty == 1.0 else repetition_penalty
    sampling = Sampling(temperature, None, top_p, min_p, penalty)
    plan = Plan(calls, n_slots, is_greedy=temperature == 0, top_k=top_k)
    return _run(inputs, jax.random.key(seed), sampling, plan, max_new_tokens, on_token)


def _calls(model: nn.Module, start_token: int) -> Calls:
    lacking = [name for name in ("hidden", "logits", "init_cache", "vocab_size") if not hasattr(model, name)]
    if lacking:
        name = type(model).__name__
        raise GenerateError(f"{name} lacks {', '.join(lacking)}; give a decoder, such as jaxdl.models.gpt2.GPT2.")
    return Calls(model, start_token)


def _run(inputs: Any, rng: Any, sampling: Sampling, plan: Plan, n: int, on_token: Any) -> list[list[int]]:
    params, tokens, mask, stops = inputs
    state = begin(params, tokens, mask, stops, rng, sampling, plan=plan)
    told = 0
    while on_token is not None:
        told = _tell(state, told, on_token)
        if told >= n or bool(jnp.all(state.is_done)):
            break
        limit = np.int32(min(n, told + STREAM_TOKENS))
        state = advance(params, state, limit, stops, rng, sampling, plan=plan)
    if on_token is None:
        state = advance(params, state, np.int32(n), stops, rng, sampling, plan=plan)
    return _lists(state.tokens, state.lengths)


def _tell(state: State, told: int, on_token: Callable[[int, int], Any]) -> int:
    """Hands on the tokens drawn since, in the order of time; returns how many have been by now."""
    n, tokens, lengths = jax.device_get((state.n, state.tokens, state.lengths))
    for i in range(told, int(n)):
        for row in np.flatnonzero(lengths > i):
            on_token(int(row), int(tokens[row, i]))
    return int(n)


def _lists(tokens: Any, lengths: Any) -> list[list[int]]:
    tokens, lengths = jax.device_get((tokens, lengths))
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
