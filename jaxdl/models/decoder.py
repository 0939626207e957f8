"""What all language models that read from left to right share.

Dimensions: `B` batch, `T` time, `D` width, `V` vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.block import Block, Cache
from jaxdl.models.checks import check, count_problem, name_problem
from jaxdl.models.embedding import Embed, padded_size
from jaxdl.models.layers import Dtype
from jaxdl.models.product import product
from jaxdl.models.transformer import LAYOUTS, REMATS, Stack, init_cache, token_positions

HEADS = ("causal_lm", "classify", "tag", "embed")


class Decoder(nn.Module):
    """A stack of causal blocks over embedded tokens, and a head; the families say which embedding and which blocks.

    Paths: `embed/...` of `Embed`, `decoder/...` of `Stack`, and `head/kernel` (with "tag" also `head/bias`) unless the
    logits are tied to the token embedding.

    Args:
      block: each layer; it must be causal.
      n_layers: L.
      vocab_size: V.
      head: "causal_lm", logits of the next token; "classify", of the last real token; "tag", of every token; "embed",
        the mean over real tokens, of length 1; None, the hidden states.
      n_outputs: classes of "classify" and "tag".
      labels: names of the outputs, for those who read them; no part of the computation.
      padding_token: where "classify" is given no mask, the last real token is the last that is not this one.
      layout, remat: see `Stack`.

    Raises:
      ModelError: fields that make no network.
    """

    block: Block
    n_layers: int
    vocab_size: int
    head: str | None = "causal_lm"
    n_outputs: int | None = None
    labels: tuple[str, ...] = ()
    padding_token: int | None = None
    layout: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        check(type(self).__name__, *self._problems())
        super().__post_init__()

    def _problems(self) -> list[str | None]:
        has_outputs = self.head in ("classify", "tag")
        return [
            count_problem("n_layers", self.n_layers),
            count_problem("vocab_size", self.vocab_size),
            None if self.head is None else name_problem("head", self.head, HEADS),
            count_problem("n_outputs", self.n_outputs) if has_outputs else None,
            self._labels_problem(),
            name_problem("layout", self.layout, LAYOUTS),
            name_problem("remat", self.remat, REMATS),
            None if self.block.is_causal else "block.is_causal=False sees the future; use is_causal=True.",
            "block.has_cross=True needs an encoder; use has_cross=False." if self.block.has_cross else None,
        ]

    def _labels_problem(self) -> str | None:
        n = len(self.labels)
        return (
            f"labels names {n} outputs and n_outputs={self.n_outputs}; name each."
            if n not in (0, self.n_outputs)
            else None
        )

    def setup(self) -> None:
        self.embed = self._embed()
        self.decoder = self._stack(name="decoder")
        if self.head in ("classify", "tag"):
            self.output = self._dense(self.n_outputs or 0, use_bias=self.head == "tag")
        elif self.head == "causal_lm" and not self._is_tied():
            self.output = self._dense(padded_size(self.vocab_size), use_bias=False)

    def _embed(self) -> Embed:
        return Embed(self.block, self.vocab_size, name="embed")

    def _stack(self, **kw: Any) -> Stack:
        return Stack(self.layer_blocks(), layout=self.layout, remat=self.remat, **kw)

    @nn.nowrap
    def layer_blocks(self) -> tuple[Block, ...]:
        """The block of each layer."""
        return (self.block,) * self.n_layers

    def _is_tied(self) -> bool:
        return True

    def _dense(self, n: int, *, use_bias: bool) -> nn.Dense:
        block = self.block
        init = nn.initializers.normal(block.init_std)
        dtype = jnp.promote_types(block.dtype, jnp.float32) if self.head != "causal_lm" else block.dtype
        dtypes = {"dtype": dtype, "param_dtype": block.param_dtype}
        return nn.Dense(n, use_bias=use_bias, kernel_init=init, dot_general=product, name="head", **dtypes)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        positions: Array | None = None,
        documents: Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Any:
        """Runs the model.

        Args:
          tokens: (B, T) int.
          mask: (B, T), 0 for padding.
          positions: (B or 1, T) int; by default they count the real tokens.
          documents: (B, T) int; tokens see their own document only.
          cache: of `init_cache` or of the call before; the T tokens follow those in it.
          train: dropout is on.

        Returns:
          What the head says: logits (B, T, V), (B, n_outputs) or (B, T, n_outputs), or vectors (B, D) or (B, T, D);
          with a cache, `(output, cache)`.
        """
        sight: dict[str, Any] = {"mask": mask, "positions": positions, "documents": documents, "cache": cache}
        out = self.hidden(tokens, **sight, train=train)
        x_BTD, new = (out, None) if cache is None else out
        if mask is None and self.padding_token is not None and self.head == "classify":
            mask = tokens != self.padding_token
        y = self._head(x_BTD, mask)
        return y if cache is None else (y, new)

    def hidden(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        positions: Array | None = None,
        documents: Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Any:
        """The states after the last norm, (B, T, D); arguments as of a call, and with a cache `(states, cache)`."""
        if positions is None:
            positions = token_positions(tokens.shape[1], mask, cache)
        x_BTD = self.embed(tokens, positions, train=train)
        x_BTD, new = self.decoder(x_BTD, mask=mask, positions=positions, documents=documents, cache=cache, train=train)
        return x_BTD if cache is None else (x_BTD, new)

    def logits(self, hidden: Array) -> Array:
        """Hidden states (..., D) -> logits of the next token (..., V), float32 at least."""
        if self._is_tied():
            return self.embed.logits(hidden)
        check(type(self).__name__, self._no_logits_problem())
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return self.output(hidden)[..., : self.vocab_size].astype(dtype)

    def _no_logits_problem(self) -> str | None:
        none = f"head={self.head!r} has no logits of the next token, as they are not tied; use head='causal_lm'."
        return None if self.head == "causal_lm" else none

    def _head(self, x_BTD: Array, mask: Array | None) -> Array:
        if self.head == "causal_lm":
            return self.logits(x_BTD)
        if self.head == "tag":
            return self.output(x_BTD)
        if self.head == "classify":
            return self.output(last_real(x_BTD, mask))
        return mean_real(x_BTD, mask) if self.head == "embed" else x_BTD

    @nn.nowrap
    def init_cache(self, n_rows: int, n_slots: int, *, dtype: Dtype | None = None) -> Cache:
        """An empty cache for `n_slots` tokens, padding included, of the block's dtype; see `transformer.init_cache`."""
        return init_cache(self._stack(parent=None), n_rows, n_slots, dtype=self.block.dtype if dtype is None else dtype)


def last_real(x_BTD: Array, mask: Array | None) -> Array:
    """The states of each row's last real token: (B, D); of its last token where the mask is None.

    Example:
      >>> last_real(jnp.arange(3.0).reshape(1, 3, 1), jnp.array([[1, 1, 0]])).tolist()
      [[1.0]]
    """
    if mask is None:
        return x_BTD[:, -1]
    last_B = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1] != 0, axis=1)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]


def mean_real(x_BTD: Array, mask: Array | None) -> Array:
    """The mean over real tokens, scaled to length 1: (B, D), float32 at least.

    Example:
      >>> mean_real(jnp.array([[[3.0, 4.0], [9.0, 9.0]]]), jnp.array([[1, 0]])).round(1).tolist()
      [[0.6000000238418579, 0.800000011920929]]
    """
    x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    weight_BT1 = jnp.ones((*x_BTD.shape[:2], 1)) if mask is None else mask[..., None]
    sum_BD = jnp.sum(jnp.where(weight_BT1 != 0, x_BTD, 0), axis=1)
    return sum_BD / jnp.maximum(jnp.linalg.norm(sum_BD, axis=-1, keepdims=True), 1e-12)
