"""The networks that text experiments choose between, as sections of their configurations."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn

from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.recurrent_lm import RecurrentLM


@dataclass(frozen=True)
class Transformer:
    """What the transformers share."""

    n_layers: int = 4  # blocks one after the other
    width: int = 192  # of the residual stream
    n_heads: int = 6  # of the attention
    hidden: int | None = None  # width of the feed-forward network; 4 times the width where None
    dropout_rate: float = 0.0  # share of units dropped in training
    layout: Literal["auto", "unrolled", "scanned"] = "auto"  # one layer compiled once or each by itself
    remat: Literal["none", "full", "dots", "dots_without_batch"] = "none"  # what is computed anew to save memory
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # implementation of the attention

    def problems(self) -> Iterator[str]:
        counts = {"n_layers": self.n_layers, "width": self.width, "n_heads": self.n_heads}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        if self.n_heads > 0 and self.width % self.n_heads:
            yield f"width={self.width} does not divide over n_heads={self.n_heads}; use a multiple."
        if not 0.0 <= self.dropout_rate < 1.0:
            yield f"dropout_rate={self.dropout_rate} must lie in [0, 1)."

    def stack(self) -> dict[str, Any]:
        return {"n_layers": self.n_layers, "layout": self.layout, "remat": self.remat}

    def fields(self, dtype: Any) -> dict[str, Any]:
        return {"dropout_rate": self.dropout_rate, "attention": self.attention, "dtype": dtype}


@dataclass(frozen=True)
class GPT(Transformer):
    """GPT-2: learned positions, layer norms, GELU."""

    def build(self, vocab_size: int, length: int, dtype: Any) -> nn.Module:
        more = {"hidden": self.hidden or 4 * self.width, **self.fields(dtype)}
        block = gpt2_block(width=self.width, n_heads=self.n_heads, n_layers=self.n_layers, **more)
        return GPT2(block, vocab_size=vocab_size, n_positions=length, **self.stack())


@dataclass(frozen=True)
class LlamaLike(Transformer):
    """Llama: rotary positions, RMS norms, SwiGLU, and perhaps fewer key/value heads."""

    n_kv_heads: int | None = None  # key/value heads; as many as query heads where None
    is_tied: bool = True  # the logits share the token embedding; else they have a matrix of their own

    def build(self, vocab_size: int, length: int, dtype: Any) -> nn.Module:
        more = {"hidden": self.hidden or 8 * self.width // 3, "n_kv_heads": self.n_kv_heads, **self.fields(dtype)}
        block = llama_block(width=self.width, n_heads=self.n_heads, **more)
        return Llama(block, vocab_size=vocab_size, is_tied=self.is_tied, n_positions=length, **self.stack())


@dataclass(frozen=True)
class RNN:
    """A recurrent network."""

    cell: Literal["lstm", "gru", "rnn"] = "lstm"  # the recurrent cell
    n_layers: int = 1  # one reads the outputs of the other
    width: int = 256  # of a state and of the embedding
    dropout_rate: float = 0.0  # share of units dropped in training

    def problems(self) -> Iterator[str]:
        counts = {"n_layers": self.n_layers, "width": self.width}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        if not 0.0 <= self.dropout_rate < 1.0:
            yield f"dropout_rate={self.dropout_rate} must lie in [0, 1)."

    def build(self, vocab_size: int, length: int, dtype: Any) -> nn.Module:
        rate = self.dropout_rate
        return RecurrentLM(vocab_size, self.width, self.cell, self.n_layers, dropout_rate=rate, dtype=dtype)


@dataclass(frozen=True)
class Encoder(Transformer):
    """BERT, from random parameters."""

    def build(self, vocab_size: int, length: int, dtype: Any, *, head: str, n_outputs: int = 0) -> nn.Module:
        block = bert_block(
            self.width,
            self.n_heads,
            self.hidden or 4 * self.width,
            attention_dropout_rate=self.dropout_rate,
            **self.fields(dtype),
        )
        return Bert(
            block,
            vocab_size=vocab_size,
            n_positions=length,
            head=head,
            n_outputs=n_outputs,
            head_dropout_rate=0.0 if head == "masked_lm" else self.dropout_rate,
            **self.stack(),
        )


LanguageModel = GPT | LlamaLike | RNN
