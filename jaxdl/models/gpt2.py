"""GPT-2 (Radford et al. 2019)."""

from typing import Any

from jaxdl.models.block import Block
from jaxdl.models.checks import count_problem
from jaxdl.models.decoder import Decoder
from jaxdl.models.embedding import Embed


class GPT2(Decoder):
    """Learned positions, layer norms before each branch, and logits tied to the token embedding.

    Paths and further fields: see `Decoder`.

    Args:
      n_positions: the longest sequence.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = GPT2(gpt2_block(width=8, n_heads=2), n_layers=1, vocab_size=11, n_positions=4)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens).shape, sorted(variables["params"])
      ((1, 3, 11), ['decoder', 'embed'])
    """

    n_positions: int = 1024

    def _problems(self) -> list[str | None]:
        return [*super()._problems(), count_problem("n_positions", self.n_positions)]

    def _embed(self) -> Embed:
        return Embed(self.block, self.vocab_size, n_positions=self.n_positions, name="embed")


def gpt2_block(*, width: int, n_heads: int, n_layers: int | None = None, **changes: Any) -> Block:
    """GPT-2's block: hidden layer 4 times the width, and branches that start smaller the more layers there are.

    Args:
      width: D.
      n_heads: H.
      n_layers: L, by which the last kernel of each branch starts smaller, at `0.02 / sqrt(2 L)` (section 2.3).
      changes: further fields of `Block`.

    Example:
      >>> gpt2_block(width=64, n_heads=4, dropout_rate=0.1).hidden
      256
    """
    std = None if n_layers is None else 0.02 / (2 * n_layers) ** 0.5
    settings = {"hidden": 4 * width, "is_causal": True, "residual_init_std": std, **changes}
    return Block(width=width, n_heads=n_heads, **settings)


def gpt2_small(**fields: Any) -> GPT2:
    """The published model of 124 million parameters: 12 layers of width 768.

    Args:
      fields: of `GPT2`, such as `head`.

    Example:
      >>> gpt2_small(head="classify", n_outputs=2).block.heads
      (12, 12, 64)
    """
    block = gpt2_block(width=768, n_heads=12, n_layers=12)
    return GPT2(**{"block": block, "n_layers": 12, "vocab_size": 50257, **fields})
