"""Llama (Touvron et al. 2023) and the models that differ from it by settings: Mistral, Qwen 2 and 3, Gemma 1 to 3."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.block import Block
from jaxdl.models.checks import count_problem
from jaxdl.models.decoder import Decoder
from jaxdl.models.embedding import Embed
from jaxdl.models.positions import Rotary


class Llama(Decoder):
    """Rotary positions, RMS norms and a gated feed-forward network.

    Paths and further fields: see `Decoder`; `head/kernel` (D, padded V) where the logits are not tied.

    Args:
      is_tied: the logits share the token embedding.
      logit_softcap: logits become `cap * tanh(logits / cap)` (Gemma 2).
      embed_scale: factor of the token embedding: sqrt(D) in Gemma.
      local: the block of the layers in `local_layers`: with a window or wavelengths of its own.
      local_layers: their numbers, from 0.
      n_positions: the longest sequence that it is meant for; `generate` refuses a longer one. None for no limit.

    Example:
      >>> import jax
      >>> block = llama_block(width=8, n_heads=2, hidden=16, n_kv_heads=1)
      >>> model = Llama(block, n_layers=2, vocab_size=11, local=block.replace(window=2), local_layers=(0,))
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens).shape, sorted(variables["params"])
      ((1, 3, 11), ['decoder', 'embed', 'head'])
    """

    is_tied: bool = False
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    local: Block | None = None
    local_layers: tuple[int, ...] = ()
    n_positions: int | None = None

    def _problems(self) -> list[str | None]:
        return [*super()._problems(), *self._more_problems()]

    def _more_problems(self) -> Iterator[str | None]:
        if self.n_positions is not None:
            yield count_problem("n_positions", self.n_positions)
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            yield f"logit_softcap={self.logit_softcap} must be positive; use None for no cap."
        outside = [i for i in self.local_layers if not 0 <= i < self.n_layers]
        if outside:
            yield f"local_layers has {outside}, and layers are numbered 0 to {self.n_layers - 1}."
        if (self.local is None) != (not self.local_layers):
            yield "local and local_layers go together; give both or neither."
        if self.local is not None and (self.local.width, self.local.is_causal) != (self.block.width, True):
            yield f"local must be causal and of width {self.block.width}, as block is; derive it by block.replace(...)."

    @nn.nowrap
    def layer_blocks(self) -> tuple[Block, ...]:
        """The block of each layer."""
        local = self.block if self.local is None else self.local
        return tuple(local if i in self.local_layers else self.block for i in range(self.n_layers))

    def _embed(self) -> Embed:
        return Embed(self.block, self.vocab_size, scale=self.embed_scale, name="embed")

    def _is_tied(self) -> bool:
        return self.is_tied

    def logits(self, hidden: Array) -> Array:
        """Hidden states (..., D) -> logits of the next token (..., V), float32 at least."""
        logits, cap = super().logits(hidden), self.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def llama_block(*, width: int, n_heads: int, hidden: int, **changes: Any) -> Block:
    """Llama's block: RMS norms, SwiGLU, rotary positions, no biases.

    Args:
      width, n_heads, hidden: D, H and F.
      changes: further fields of `Block`.

    Example:
      >>> llama_block(width=64, n_heads=4, hidden=128, n_kv_heads=2).heads
      (4, 2, 16)
    """
    settings: dict[str, Any] = {
        "norm": "rms",
        "norm_epsilon": 1e-6,
        "activation": "silu",
        "is_gated": True,
        "query_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "rotary": Rotary(),
        "is_causal": True,
    }
    return Block(width=width, n_heads=n_heads, hidden=hidden, **{**settings, **changes})
