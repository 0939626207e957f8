"""Tokens to vectors, and hidden states back to logits over tokens.

Dimensions: `B` batch, `T` time, `D` width, `V` vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.models.block import Block, Norm
from jaxdl.models.checks import check, count_problem, rate_problem
from jaxdl.models.layers import dropout
from jaxdl.models.positions import sinusoids
from jaxdl.models.product import table_product

VOCABULARY_MULTIPLE = 128


def padded_size(vocab_size: int) -> int:
    """Rows of an embedding: the vocabulary, filled up to a multiple of 128, the tile of GPUs and TPUs.

    Example:
      >>> padded_size(50257)
      50304
    """
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class Embed(nn.Module):
    """The sum of token, position and token-type embeddings, perhaps normed, and dropout.

    Paths: `token/embedding` (padded V, D), `position/embedding`, `token_type/embedding`, `norm/{scale,bias}`.

    Args:
      block: gives width, norm, dropout and dtypes.
      vocab_size: V; the table has `padded_size(V)` rows, and those beyond V are never read nor moved.
      n_positions: rows of learned positions; 0 for none.
      has_sinusoids: fixed positions (Vaswani et al. 2017) for up to `n_positions` tokens instead of learned ones.
      n_token_types: rows of token types; 0 for none.
      has_norm: a norm on the sum.
      scale: factor of the token embedding, such as sqrt(D).

    Raises:
      ModelError: fields that make no network, or more tokens than positions.

    Example:
      >>> import jax
      >>> embed = Embed(Block(width=8, n_heads=2, hidden=16), vocab_size=5, n_positions=4)
      >>> variables = embed.init(jax.random.key(0), jnp.array([[1, 2]]), jnp.array([[0, 1]]))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'position': {'embedding': (4, 8)}, 'token': {'embedding': (128, 8)}}
    """

    block: Block
    vocab_size: int
    n_positions: int = 0
    has_sinusoids: bool = False
    n_token_types: int = 0
    has_norm: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        check(
            "Embed",
            count_problem("vocab_size", self.vocab_size),
            count_problem("n_positions", self.n_positions, least=int(self.has_sinusoids)),
            count_problem("n_token_types", self.n_token_types, least=0),
            rate_problem("dropout_rate", self.block.dropout_rate),
        )
        super().__post_init__()

    def setup(self) -> None:
        self.token = self._table(padded_size(self.vocab_size), "token", n_read=self.vocab_size)
        if self.n_positions and not self.has_sinusoids:
            self.position = self._table(self.n_positions, "position")
        if self.n_token_types:
            self.token_type = self._table(self.n_token_types, "token_type")
        if self.has_norm:
            self.norm = Norm(self.block, name="norm")

    def _table(self, n_rows: int, name: str, n_read: int | None = None) -> "Table":
        block = self.block
        return Table(
            n_rows,
            block.width,
            n_read=n_read,
            embedding_init=nn.initializers.normal(block.init_std),
            dtype=block.dtype,
            param_dtype=block.param_dtype,
            name=name,
        )

    def __call__(
        self, tokens_BT: Array, positions_BT: Array, token_types_BT: Array | None = None, *, train: bool = False
    ) -> Array:
        """(B, T) int tokens and (B or 1, T) positions -> (B, T, D)."""
        check("Embed", *self._problems(tokens_BT))
        x_BTD = self.token(tokens_BT)
        if self.scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(self.scale, x_BTD.dtype)
        if self.has_sinusoids:
            x_BTD = x_BTD + jnp.asarray(sinusoids(self.n_positions, self.block.width), x_BTD.dtype)[positions_BT]
        elif self.n_positions:
            x_BTD = x_BTD + self.position(positions_BT)
        if self.n_token_types:
            x_BTD = x_BTD + self.token_type(jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT)
        if self.has_norm:
            x_BTD = self.norm(x_BTD)
        return self._dropped(x_BTD, train)

    def _problems(self, tokens_BT: Array) -> list[str | None]:
        is_int, n = jnp.issubdtype(tokens_BT.dtype, jnp.integer), tokens_BT.shape[-1]
        return [
            None if tokens_BT.ndim == 2 else f"tokens have shape {tokens_BT.shape}; they must be (batch, time).",
            None if is_int else f"tokens are {tokens_BT.dtype}; they must be integers.",
            f"{n} tokens are more than the {self.n_positions} positions of this model; cut them, or use a longer model."
            if self.n_positions and n > self.n_positions
            else None,
        ]

    @nn.compact
    def _dropped(self, x_BTD: Array, train: bool) -> Array:
        return dropout(x_BTD, self.block.dropout_rate, train=train, name="dropout")

    def logits(self, x_BTD: Array) -> Array:
        """Tied logits: (..., D) -> (..., V), products of x's dtype in float32; the padding of the table is cut off."""
        return self.token.attend(x_BTD)[..., : self.vocab_size]


class Table(nn.Embed):
    """An embedding whose gradients are summed in the dtype of its parameters: rows that many tokens share would lose
    most of their gradient in bfloat16, and a GPU adds there one after the other.

    Products with vectors, `attend`, are made in the dtype of the vectors, as a Dense layer's are, and then given as
    float32 at least: a loss reads logits of bfloat16 in half the time of float32.

    Args:
      n_read: rows that are read; the rest is padding. A CPU cuts it off the table where there are so many vectors that
        their products are larger than it; a GPU wants it whole.
    """

    n_read: int | None = None

    def __call__(self, inputs: Array) -> Array:
        """(...) int -> (..., D) in `dtype`."""
        return jnp.take(self.embedding, inputs, axis=0).astype(self.dtype or self.embedding.dtype)

    def attend(self, query: Array) -> Array:
        """(..., D) -> (..., rows), or on a CPU perhaps (..., rows that are read)."""
        is_cut = jax.default_backend() == "cpu" and query.size > query.shape[-1] ** 2
        n_rows = self.n_read if is_cut else None
        products = table_product(query, jnp.asarray(self.embedding[:n_rows], query.dtype))
        return products.astype(jnp.promote_types(query.dtype, jnp.float32))
