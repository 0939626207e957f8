"""Corrupted inputs for denoising: BERT's masked tokens and T5's spans, as `(example, rng) -> example`.

They work on the last axis, so `mask_tokens` serves single rows (`Pipeline(transforms=...)`) and whole batches
(`batch_transforms`, many times faster) alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdl.errors import JaxdlError

Example = dict[str, Any]
Corruption = Callable[[Example, np.random.Generator], Example]


def mask_tokens(tokenizer: Any, *, probability: float = 0.15, whole_words: bool = False) -> Corruption:
    """Hides tokens for masked language modelling: of the chosen ones 80 % become the mask token, 10 % a random token,
    10 % stay. Special tokens and padding are never chosen.

    Args:
      tokenizer: with a token of the role "mask".
      probability: of each token (or word) to be chosen, 0 < probability < 1.
      whole_words: choose whole words, by the example's "word_ids" (-1 at special tokens).

    Returns:
      A transform: "tokens" (..., T) becomes the corrupted "tokens", the old ones as "targets", and "weight" float32,
      1 at the chosen tokens; "word_ids" is dropped. With "mask" in the example, tokens outside it are not chosen.

    Raises:
      JaxdlError: a probability out of range, a tokenizer without a mask token.

    Source: Devlin et al. 2019, "BERT", arXiv:1810.04805, section 3.1; whole words as in the authors' later code.

    Example:
      >>> from jaxdl.data.text import ByteTokenizer
      >>> corrupt = mask_tokens(ByteTokenizer(), probability=0.5)
      >>> example = corrupt({"tokens": np.array([65, 66, 67, 256])}, np.random.default_rng(0))
      >>> example["targets"].tolist(), example["weight"][3]
      ([65, 66, 67, 256], np.float32(0.0))
    """
    _check_probability(probability)
    mask_id, is_special = tokenizer.id_of("mask"), np.zeros(tokenizer.vocab_size, bool)
    is_special[tokenizer.special_ids] = True
    plain = np.flatnonzero(~is_special).astype(np.int32)

    def corrupt(example: Example, rng: np.random.Generator) -> Example:
        tokens = np.asarray(example["tokens"])
        draw = rng.random(tokens.shape)
        if whole_words:
            draw = np.take_along_axis(draw, _first_of_word(example), axis=-1)
        is_open = ~is_special[tokens] & np.asarray(example.get("mask", True), bool)
        is_chosen = (draw < probability) & is_open
        fate = rng.random(tokens.shape)
        random = plain[rng.integers(0, len(plain), tokens.shape)]
        hidden = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, random, tokens))
        kept = {key: value for key, value in example.items() if key != "word_ids"}
        corrupted = np.where(is_chosen, hidden, tokens).astype(np.int32)
        return {**kept, "tokens": corrupted, "targets": tokens.astype(np.int32), "weight": is_chosen.astype(np.float32)}

    return corrupt


def _first_of_word(example: Example) -> np.ndarray:
    """For each token the place of the first token of its word, int (..., T)."""
    if "word_ids" not in example:
        raise JaxdlError("whole_words=True needs 'word_ids'; encode with has_details=True and keep them.")
    words = np.asarray(example["word_ids"])
    is_first = np.ones(words.shape, bool)
    is_first[..., 1:] = words[..., 1:] != words[..., :-1]
    return np.maximum.accumulate(np.where(is_first, np.arange(words.shape[-1]), 0), axis=-1)


def corrupt_spans(
    sentinels: Sequence[int],
    *,
    pad_id: int,
    eos_id: int,
    input_length: int,
    target_length: int,
    probability: float = 0.15,
    mean_span: float = 3.0,
) -> Corruption:
    """Takes spans out of a text for an encoder-decoder: a sentinel stands in the input for each, and before it in the
    target.

    Args:
      sentinels: ids, one a span; see `sentinel_ids`.
      pad_id: fills up; also the first token of the decoder.
      eos_id: ends the input and the target.
      input_length, target_length: what the rows are padded to; see `span_lengths`.
      probability: the share of tokens that are taken out.
      mean_span: tokens of a span on average.

    Returns:
      A transform of single examples: "tokens" (n,) (less what "mask" leaves out) becomes "tokens" and "mask"
      (input_length,), "decoder_tokens" (the targets moved right by one), "targets" and "weight" (target_length,).

    Raises:
      JaxdlError: a share or span out of range; at the call, rows that need more sentinels or places.

    Source: Raffel et al. 2020, "T5", arXiv:1910.10683, section 3.1.4.

    Example:
      >>> corrupt = corrupt_spans([99, 98], pad_id=0, eos_id=1, input_length=12, target_length=6)
      >>> out = corrupt({"tokens": np.arange(10, 20)}, np.random.default_rng(0))
      >>> out["tokens"].tolist(), out["targets"].tolist()
      ([10, 11, 12, 13, 14, 15, 16, 17, 99, 1, 0, 0], [99, 18, 19, 1, 0, 0])
    """
    _check_probability(probability)
    if not mean_span >= 1:
        raise JaxdlError(f"mean_span={mean_span} must be at least 1 token.")
    codes = np.asarray(sentinels, np.int32)

    def corrupt(example: Example, rng: np.random.Generator) -> Example:
        tokens = np.asarray(example["tokens"], np.int32)
        tokens = tokens[np.asarray(example["mask"], bool)] if "mask" in example else tokens
        is_noise = _noise_mask(len(tokens), probability, mean_span, rng)
        inputs, targets = _fold(tokens, is_noise, codes, eos_id), _fold(tokens, ~is_noise, codes, eos_id)
        padded, real = _pad(inputs, input_length, pad_id, "input_length")
        wanted, weight = _pad(targets, target_length, pad_id, "target_length")
        before = np.concatenate([[pad_id], wanted[:-1]]).astype(np.int32)
        rest = {key: value for key, value in example.items() if key not in ("tokens", "mask", "token_types")}
        weights = weight.astype(np.float32)
        return {
            **rest,
            "tokens": padded,
            "mask": real,
            "decoder_tokens": before,
            "targets": wanted,
            "weight": weights,
        }

    return corrupt


def _noise_mask(n: int, probability: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Bool (n,): exactly round(n * probability) True in round(that / mean_span) runs; begins with a kept token."""
    if n < 2:
        raise JaxdlError(f"a text of {n} token(s) has no span to take out; drop texts of fewer than 2.")
    n_noise = min(max(round(n * probability), 1), n - 1)
    n_spans = min(max(round(n_noise / mean_span), 1), n_noise, n - n_noise)
    noise, kept = (_lengths(count, n_spans, rng) for count in (n_noise, n - n_noise))
    return np.repeat(np.tile([False, True], n_spans), np.stack([kept, noise], 1).reshape(-1))


def _lengths(total: int, n_parts: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers of at least 1 that add up to `total`, every such list equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: n_parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _fold(tokens: np.ndarray, is_out: np.ndarray, codes: np.ndarray, eos_id: int) -> np.ndarray:
    """Puts one sentinel in the place of each run of `is_out`.

    The text begins with a kept run: for the target, whose first run is left out too, sentinel 0 stands for that run.
    """
    is_first = is_out & ~np.concatenate([[False], is_out[:-1]])
    if is_first.sum() > len(codes):
        raise JaxdlError(f"a text needs {is_first.sum()} sentinels and there are {len(codes)}; give more, or cut it.")
    numbered = np.where(is_first, codes[np.maximum(np.cumsum(is_first) - 1, 0)], tokens)
    return np.append(numbered[~is_out | is_first], eos_id).astype(np.int32)


def _pad(values: np.ndarray, length: int, pad_id: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    if len(values) > length:
        raise JaxdlError(f"{name}={length} is too short for a row of {len(values)} tokens; span_lengths says how many.")
    return np.pad(values, (0, length - len(values)), constant_values=pad_id), np.arange(length) < len(values)


def span_lengths(n_tokens: int, *, probability: float = 0.15, mean_span: float = 3.0) -> tuple[int, int, int]:
    """What `corrupt_spans` makes of texts of `n_tokens`: `(input_length, target_length, sentinels needed)`.

    Example:
      >>> span_lengths(512)
      (462, 104, 26)
    """
    n_noise = min(max(round(n_tokens * probability), 1), n_tokens - 1)
    n_spans = min(max(round(n_noise / mean_span), 1), n_noise, n_tokens - n_noise)
    return n_tokens - n_noise + n_spans + 1, n_noise + n_spans + 1, n_spans


def sentinel_ids(tokenizer: Any, n: int) -> np.ndarray:
    """The ids of `<extra_id_0>` .. `<extra_id_{n-1}>`; the last ids of a `ByteTokenizer(n_sentinels=n)`.

    Raises:
      JaxdlError: the tokenizer has fewer.

    Example:
      >>> from jaxdl.data.text import ByteTokenizer
      >>> sentinel_ids(ByteTokenizer(n_sentinels=2), 2).tolist()
      [262, 263]
    """
    backend = getattr(tokenizer, "backend", None)
    if backend is None:
        found: list[Any] = list(range(262, tokenizer.vocab_size))[:n]
    else:
        found = [backend.token_to_id(f"<extra_id_{i}>") for i in range(n)]
    if len(found) < n or None in found:
        raise JaxdlError(
            f"the tokenizer has fewer than {n} sentinels; train it with extra_tokens=['<extra_id_0>', ...], or use"
            " ByteTokenizer(n_sentinels=...)."
        )
    return np.array(found, np.int32)


def _check_probability(probability: float) -> None:
    if not 0 < probability < 1:
        raise JaxdlError(f"probability={probability} must be greater than 0 and less than 1.")
