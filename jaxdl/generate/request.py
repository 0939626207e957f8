"""What `generate` is asked for: everything that is wrong with it at once, and prompts as one padded array."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from jaxdl.errors import JaxdlError
from jaxdl.models.checks import count_problem

LEAST_BUCKET = 16


class GenerateError(JaxdlError):
    """`generate` cannot do what was asked; the message lists every problem."""


class Options(NamedTuple):
    """The options of `generate`, as given."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop_tokens: tuple[int, ...]
    n_beams: int
    length_penalty: float
    on_token: Callable[[int, int], Any] | None
    start_token: int


def check_request(model: nn.Module, prompts: Sequence[Sequence[int]], options: Options, *, has_encoder: bool) -> None:
    """Raises one GenerateError with all that is wrong with the prompts and the options.

    Raises:
      GenerateError: see `generate`.
    """
    problems = [*_option_problems(model.vocab_size, options), *_prompt_problems(model, prompts, options, has_encoder)]
    if problems:
        raise GenerateError.listing("generate", problems)


def _option_problems(vocab_size: int, options: Options) -> Iterator[str]:
    for name in ("max_new_tokens", "n_beams", "top_k"):
        value = getattr(options, name)
        if (value is not None or name != "top_k") and (problem := count_problem(name, value)):
            yield problem
    if not options.temperature >= 0:
        yield f"temperature={options.temperature} must not be negative; 0 takes the most likely token."
    if options.top_p is not None and not 0 < options.top_p <= 1:
        yield f"top_p={options.top_p} must be in (0, 1]."
    if options.min_p is not None and not 0 <= options.min_p <= 1:
        yield f"min_p={options.min_p} must be in [0, 1]."
    if not options.repetition_penalty > 0:
        yield f"repetition_penalty={options.repetition_penalty} must be positive; 1 is none."
    for name, tokens in {"stop_tokens": options.stop_tokens, "start_token": (options.start_token,)}.items():
        if outside := [token for token in tokens if not 0 <= token < vocab_size]:
            yield f"{name} has {outside}, and the vocabulary is 0 to {vocab_size - 1}."
    yield from _contradictions(options)


def _contradictions(options: Options) -> Iterator[str]:
    filters = [name for name in ("top_k", "top_p", "min_p") if getattr(options, name) is not None]
    if options.temperature == 0 and filters:
        yield f"{', '.join(filters)} do nothing at temperature=0, the likeliest token; set a temperature or drop them."
    if options.n_beams == 1:
        if options.length_penalty != 1.0:
            yield f"length_penalty={options.length_penalty} is of beam search; set n_beams or drop it."
        return
    if options.temperature != 0:
        yield f"n_beams={options.n_beams} takes the most likely beams, not temperature={options.temperature}; drop one."
    if options.repetition_penalty != 1.0:
        yield f"repetition_penalty={options.repetition_penalty} is not for beam search; use n_beams=1."
    if options.on_token is not None:
        yield f"n_beams={options.n_beams} knows its tokens at the end only; use n_beams=1 with on_token."


def _prompt_problems(
    model: nn.Module, prompts: Sequence[Sequence[int]], options: Options, has_encoder: bool
) -> Iterator[str]:
    size, limit = model.vocab_size, getattr(model, "n_positions", None)
    slots = getattr(model, "slot_ids", ())  # of an adapted model, see finetune.prompts
    if len(prompts) == 0:
        yield "there are no prompts; give a list of lists of tokens."
    for row, prompt in enumerate(prompts):
        given: Any = prompt
        if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
            yield f"prompt {row} is {prompt!r}; give the list of its tokens."
            continue
        tokens = [token for token in prompt if isinstance(token, int | np.integer)]
        if len(tokens) != len(prompt):
            yield f"prompt {row} holds what is no whole number; give the list of its tokens."
        elif not tokens:
            yield f"prompt {row} is empty; give it at least one token, such as the one that begins a text."
        elif outside := [int(token) for token in tokens if not 0 <= token < size and token not in slots]:
            yield f"prompt {row} has tokens {outside[:5]}, and the vocabulary is 0 to {size - 1}."
        n_all = len(prompt) + (0 if has_encoder else options.max_new_tokens)
        if limit and n_all > limit:
            yield (
                f"prompt {row} has {len(prompt)} tokens, with max_new_tokens={options.max_new_tokens} {n_all}, more "
                f"than the {limit} positions of {type(model).__name__}; cut the prompt or ask for fewer."
            )


def bucket(n: int, *, most: int | None = None) -> int:
    """The power of two, at least 16, that holds n; never above `most`.

    Example:
      >>> bucket(3), bucket(17), bucket(900, most=1000)
      (16, 32, 1000)
    """
    size = max(LEAST_BUCKET, 1 << (n - 1).bit_length())
    return size if most is None else max(n, min(size, most))


def pad_left(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as one array, ending together.

    Returns:
      `(tokens, mask)`: (B, length) int32, 0 where there is none, and (B, length) bool.

    Example:
      >>> tokens, mask = pad_left([[5], [6, 7]], 3)
      >>> tokens.tolist(), mask.astype(int).tolist()
      ([[0, 0, 5], [0, 6, 7]], [[0, 0, 1], [0, 1, 1]])
    """
    tokens, mask = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask
