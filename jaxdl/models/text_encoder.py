"""What the text models that read both ways share: embeddings, post-norm blocks, and a head by name.

Dimensions: `B` batch, `T` time, `D` width, `V` vocabulary, `L` layers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.bert_heads import POOLINGS, Classifier, MaskedLM, dense, embed_rows, ids_problem
from jaxdl.models.block import Block
from jaxdl.models.checks import check, count_problem, name_problem, rate_problem
from jaxdl.models.embedding import Embed
from jaxdl.models.transformer import LAYOUTS, REMATS, Stack

HEADS = ("classify", "tag", "span", "masked_lm", "embed")


class Encoded(NamedTuple):
    """What a model with `has_pooler` returns.

    Attributes:
      hidden: (B, T, D), of every token.
      pooled: (B, D), tanh of a dense layer over the first token.
    """

    hidden: Array
    pooled: Array


class TextEncoder(nn.Module):
    """An encoder in which every token sees every other, and a head; `Bert`, `Roberta` and `DistilBert` are such.

    Heads, by what `model(tokens)` returns:
      None: hidden states (B, T, D); with `has_pooler` `Encoded(hidden, pooled)`.
      "classify": (B, n_outputs), classes, or with `n_outputs=1` a regression; from the first token, and the last layer
        computes no other.
      "tag": (B, T, n_outputs), classes of each token.
      "span": (B, T, 2), logits of a span's start and end.
      "masked_lm": (B, T, V), tied to the token embedding.
      "embed": (B, D), one vector a row.

    Paths: `embed/{token,position,token_type}/embedding`, `embed/norm/{scale,bias}`, `encoder/layer_<i>/...` (see
    `Layer`), `pooler/{kernel,bias}`; `head/{kernel,bias}` of "tag", "span" and a classifier on the pooler, else
    `head/{dense,output}/{kernel,bias}`; of "masked_lm" `head/dense/{kernel,bias}`, `head/norm/{scale,bias}` and
    `head/bias` (padded V).

    Args:
      block: of every layer, see `bert_block`.
      n_layers: L.
      vocab_size: V.
      n_positions: rows of the position table, those that a `padding_token` leaves unread included.
      n_token_types: rows of token types; 0 for none.
      padding_token: positions count the tokens that are not this one, from `padding_token + 1`; None: from 0.
      head: a name above, or None.
      n_outputs: of "classify" and "tag".
      labels: names of the outputs, kept in checkpoints; the network does not read them.
      has_pooler: with `head=None`, also the first token pooled, as BERT's pre-training did.
      pooling, is_normalized: of "embed": the "mean" over real tokens or the "first" token; divided by its length.
      head_dropout_rate: of "classify", "tag" and "span".
      layout, remat: see `Stack`.

    Attributes:
      classifier: of "classify": "pooler" (the pooler, dropout, a linear layer), "tanh" (dropout, dense, tanh, dropout,
        linear) or "relu" (dense, relu, dropout, linear).

    Raises:
      ModelError: fields that make no network (at construction), or inputs that do not fit it.
    """

    block: Block
    n_layers: int
    vocab_size: int
    n_positions: int = 512
    n_token_types: int = 0
    padding_token: int | None = None
    head: str | None = None
    n_outputs: int = 0
    labels: Sequence[str] = ()
    has_pooler: bool = False
    pooling: str = "mean"
    is_normalized: bool = True
    head_dropout_rate: float = 0.0
    layout: str = "auto"
    remat: str = "none"

    classifier = "pooler"

    def __post_init__(self) -> None:
        check(type(self).__name__, *self._problems())
        super().__post_init__()

    def _problems(self) -> Iterator[str | None]:
        counts = {"n_layers": 1, "vocab_size": 1, "n_positions": 1, "n_token_types": 0}
        sizes = [count_problem(name, getattr(self, name), least=least) for name, least in counts.items()]
        yield from sizes
        yield None if self.head is None else name_problem("head", self.head, HEADS)
        known = {"pooling": POOLINGS, "layout": LAYOUTS, "remat": REMATS}
        yield from (name_problem(field, getattr(self, field), names) for field, names in known.items())
        yield rate_problem("head_dropout_rate", self.head_dropout_rate)
        if self.head in ("classify", "tag"):
            yield count_problem("n_outputs", self.n_outputs)
        elif self.n_outputs:
            yield f"n_outputs={self.n_outputs} has no use for head={self.head!r}; drop it."
        if self.labels and len(self.labels) != self.n_outputs:
            yield f"labels={tuple(self.labels)} must be n_outputs={self.n_outputs} names; give as many."
        if self.has_pooler and self.head is not None:
            yield f"has_pooler=True is for head=None, not {self.head!r}; drop it."
        if self.block.is_causal or self.block.has_cross:
            yield "the block is causal or has cross-attention, and an encoder has neither; change is_causal, has_cross."
        if self.padding_token is None or any(sizes):
            return
        if not 0 <= self.padding_token < min(self.vocab_size, self.n_positions - 1):
            yield f"padding_token={self.padding_token} must be one of the tokens, and leave positions after it."

    def setup(self) -> None:
        block, layers = self.block, (self.block,) * self.n_layers
        self.embed = Embed(
            block,
            self.vocab_size,
            n_positions=self.n_positions,
            n_token_types=self.n_token_types,
            has_norm=True,
            name="embed",
        )
        self.encoder = Stack(layers, layout=self.layout, remat=self.remat, has_final_norm=False, name="encoder")
        if self.is_pooled:
            self.pooler = dense(block, block.width, dtype=block.dtype, name="pooler")
        self.head_dropout = nn.Dropout(self.head_dropout_rate, name="head_dropout")
        self.output = self._output()

    def _output(self) -> Any:
        """The module whose parameters are `head/...`."""
        if self.head == "masked_lm":
            return MaskedLM(self.block, self.vocab_size, name="head")
        if self.head == "classify" and not self.is_pooled:
            return Classifier(self.block, self.n_outputs, self.classifier, self.head_dropout_rate, name="head")
        if self.head in ("classify", "tag", "span"):
            dtype = jnp.promote_types(self.block.dtype, jnp.float32)
            return dense(self.block, self.n_outputs or 2, dtype=dtype, name="head")
        return None

    @property
    def is_pooled(self) -> bool:
        """There is a pooler."""
        return self.has_pooler or (self.head == "classify" and self.classifier == "pooler")

    @property
    def max_tokens(self) -> int:
        """The longest row that the positions allow."""
        return self.n_positions - (0 if self.padding_token is None else self.padding_token + 1)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        positions: Array | None = None,
        documents: Array | None = None,
        train: bool = False,
    ) -> Any:
        """Runs the encoder and the head.

        Args:
          tokens: (B, T) int.
          mask: (B, T), 0 for padding, which no token sees.
          token_types: (B, T) int; all 0 by default.
          positions: (B, T) int from 0, also for RoBERTa; by default the tokens' places.
          documents: (B, T) int, 0 for padding; tokens see their own document only. Not for one output a row.
          train: dropout is on.

        Returns:
          What the head gives, see the class.
        """
        inputs = {"mask": mask, "token_types": token_types, "positions": positions, "documents": documents}
        n_first = 1 if self.head == "classify" or (self.head == "embed" and self.pooling == "first") else None
        hidden_BTD = self.hidden(tokens, **inputs, n_first=n_first, train=train)
        if self.head == "masked_lm":
            return self.logits(hidden_BTD)
        if self.head == "embed":
            return embed_rows(hidden_BTD, mask, pooling=self.pooling, is_normalized=self.is_normalized)
        if self.head == "classify" and not self.is_pooled:
            return self.output(hidden_BTD[:, 0], train=train)
        if self.head is None:
            return Encoded(hidden_BTD, self._pool(hidden_BTD)) if self.has_pooler else hidden_BTD
        features = self._pool(hidden_BTD) if self.is_pooled else hidden_BTD
        return self.output(self.head_dropout(features, deterministic=not train))

    def hidden(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        positions: Array | None = None,
        documents: Array | None = None,
        n_first: int | None = None,
        train: bool = False,
    ) -> Array:
        """The encoder's output (B, T, D), of the same inputs as the call; of `n_first` tokens where they are enough."""
        check(type(self).__name__, *self._input_problems(tokens, token_types, documents))
        x_BTD = self.embed(tokens, self._positions(tokens, mask, positions), token_types, train=train)
        return self.encoder(x_BTD, mask=mask, documents=documents, n_first=n_first, train=train)[0]

    def _positions(self, tokens: Array, mask: Array | None, positions: Array | None) -> Array:
        if self.padding_token is None:
            return jnp.arange(tokens.shape[1])[None] if positions is None else positions
        if positions is not None:
            return positions + self.padding_token + 1
        is_real_BT = tokens != self.padding_token
        if mask is not None:  # what stands at padding must not move the tokens after it
            is_real_BT &= mask.astype(bool)
        return self.padding_token + jnp.where(is_real_BT, jnp.cumsum(is_real_BT, axis=1), 0)

    def _input_problems(
        self, tokens: Array, token_types: Array | None, documents: Array | None
    ) -> Iterator[str | None]:
        n, most = tokens.shape[-1], self.max_tokens
        if n > most:
            yield f"{n} tokens are more than the {most} positions of this model; cut them, or use a longer model."
        yield ids_problem("tokens", tokens, self.vocab_size, "vocab_size")
        if token_types is not None and self.n_token_types:
            yield ids_problem("token_types", token_types, self.n_token_types, "n_token_types")
        elif token_types is not None:
            yield "this model has no token types (n_token_types=0); leave token_types out."
        if documents is not None and self.head in ("classify", "embed"):
            yield f"head={self.head!r} gives one output a row, and documents pack several into it; leave them out."

    def _pool(self, hidden_BTD: Array) -> Array:
        return jnp.tanh(self.pooler(hidden_BTD[:, 0]))

    def logits(self, hidden: Array) -> Array:
        """Logits over the vocabulary, (..., D) -> (..., V), of `head="masked_lm"`.

        Raises:
          ModelError: the model has another head.
        """
        other = f"head={self.head!r} has no logits over tokens; use head='masked_lm'."
        check(type(self).__name__, None if self.head == "masked_lm" else other)
        return self.output.add_bias(self.embed.logits(self.output(hidden)))
