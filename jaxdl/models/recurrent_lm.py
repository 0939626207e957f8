"""A recurrent language model.

Dimensions: `B` batch, `T` time, `D` width of the embedding, `F` width of a state, `V` vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.block import Cache
from jaxdl.models.checks import check, count_problem, rate_problem
from jaxdl.models.embedding import padded_size
from jaxdl.models.layers import Dtype
from jaxdl.models.product import product
from jaxdl.models.recurrent import Recurrent


class RecurrentLM(nn.Module):
    """Embedded tokens, a stack of recurrent layers, and logits of the next token (Mikolov et al. 2010).

    Paths: `embed/embedding` (padded V, D), `recurrent/...` of `Recurrent`, `head/{kernel,bias}` (F, padded V).

    Args:
      vocab_size: V.
      width: F, of a state, and D.
      cell, n_layers: of `Recurrent`.
      dropout_rate: of the embedded tokens, between layers and of the last outputs.
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      ModelError: fields that make no network.

    Example:
      >>> import jax
      >>> model = RecurrentLM(vocab_size=11, width=8)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens).shape, sorted(variables["params"])
      ((1, 3, 11), ['embed', 'head', 'recurrent'])
    """

    vocab_size: int
    width: int
    cell: str = "lstm"
    n_layers: int = 1
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check(
            "RecurrentLM",
            count_problem("vocab_size", self.vocab_size),
            count_problem("width", self.width),
            rate_problem("dropout_rate", self.dropout_rate),
        )
        super().__post_init__()

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        size = padded_size(self.vocab_size)
        self.embed = nn.Embed(size, self.width, name="embed", **dtypes)
        self.recurrent = self._recurrent(name="recurrent")
        self.dropout = nn.Dropout(self.dropout_rate, name="dropout")
        self.head = nn.Dense(size, dot_general=product, name="head", **dtypes)

    def _recurrent(self, **kw: Any) -> Recurrent:
        rate = self.dropout_rate if self.n_layers > 1 else 0.0
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Recurrent(self.width, self.cell, self.n_layers, dropout_rate=rate, **dtypes, **kw)

    def __call__(
        self, tokens: Array, *, mask: Array | None = None, cache: Cache | None = None, train: bool = False
    ) -> Any:
        """Runs the model.

        Args:
          tokens: (B, T) int.
          mask: (B, T), 0 for padding, which changes no state.
          cache: of `init_cache` or of the call before; the tokens follow those that it has seen.
          train: dropout is on.

        Returns:
          Logits (B, T, V); with a cache, `(logits, cache)`.
        """
        out = self.hidden(tokens, mask=mask, cache=cache, train=train)
        return self.logits(out) if cache is None else (self.logits(out[0]), out[1])

    def hidden(
        self, tokens: Array, *, mask: Array | None = None, cache: Cache | None = None, train: bool = False
    ) -> Any:
        """The outputs of the last layer, (B, T, F); arguments as of a call, and with a cache `(outputs, cache)`."""
        x_BTD = self.dropout(self.embed(tokens), deterministic=not train)
        carry = None if cache is None else cache["layers"]["layers"]
        x_BTF, carry = self.recurrent(x_BTD, mask=mask, carry=carry, train=train)
        x_BTF = self.dropout(x_BTF, deterministic=not train)
        return x_BTF if cache is None else (x_BTF, {"layers": {"layers": carry}})

    def logits(self, hidden: Array) -> Array:
        """Outputs (..., F) -> logits of the next token (..., V), float32 at least."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return self.head(hidden)[..., : self.vocab_size].astype(dtype)

    @nn.nowrap
    def init_cache(self, n_rows: int, n_slots: int, *, dtype: Dtype | None = None) -> Cache:
        """The states before the first token, laid out as the cache of a scanned stack; any number of slots will do."""
        return {"layers": {"layers": self._recurrent(parent=None).zero_carry(n_rows)}}
