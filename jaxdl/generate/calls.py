"""How a language model is called for its next token: the only place that knows one kind of model from another.

Dimensions: `B` rows, `T` prompt time, `D` width, `V` vocabulary.
"""

import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.models.block import Cache
from jaxdl.paths import Tree


class Calls(NamedTuple):
    """The two calls of a model; a hashable value, so that it can be static under `jit`.

    A decoder reads the prompt and goes on from it. An encoder-decoder, one whose `hidden` takes `inputs`, reads the
    prompt with its encoder, and its decoder goes on from a start token.

    Attributes:
      model: has `hidden`, `logits` and `init_cache`.
      start_token: the first input of the decoder of an encoder-decoder.
    """

    model: nn.Module
    start_token: int = 0

    @property
    def has_encoder(self) -> bool:
        """Whether the prompt is the encoder's."""
        return "inputs" in inspect.signature(self.model.hidden).parameters

    def start(self, params: Tree, tokens_BT: Array, mask_BT: Array, n_new: int) -> tuple[Array, Cache]:
        """Reads the prompts.

        Args:
          params: of the model.
          tokens_BT: (B, T) int, padded on the left; `mask_BT` is False there.
          mask_BT: (B, T) bool.
          n_new: tokens that the cache must have room for besides.

        Returns:
          `(logits_BV, cache)`: logits of the first new token.
        """
        (n_rows, length), model = tokens_BT.shape, self.model
        if not self.has_encoder:
            cache = model.init_cache(n_rows, length + n_new)
            return self._call(params, cache, tokens_BT, mask=mask_BT)
        cache = model.init_cache(n_rows, 1 + n_new, n_memory=length)
        inputs_B1 = jnp.full((n_rows, 1), self.start_token, jnp.int32)
        return self._call(params, cache, tokens_BT, mask=mask_BT, inputs=inputs_B1)

    def next(self, params: Tree, tokens_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Reads one token a row: `(logits_BV, cache)`."""
        if self.has_encoder:
            return self._call(params, cache, None, inputs=tokens_B[:, None])
        return self._call(params, cache, tokens_B[:, None])

    def seen(self, tokens_BT: Array, mask_BT: Array) -> Array:
        """The tokens that the decoder has read: (B, V) bool."""
        size = self.model.vocab_size
        if self.has_encoder:
            return jnp.broadcast_to(jnp.arange(size)[None] == self.start_token, (len(tokens_BT), size))
        rows_B1 = jnp.arange(len(tokens_BT))[:, None]
        return jnp.zeros((len(tokens_BT), size), bool).at[rows_B1, tokens_BT].max(mask_BT)

    def _call(self, params: Tree, cache: Cache, *args: Any, **kw: Any) -> tuple[Array, Cache]:
        variables = {"params": params}
        out: Any = self.model.apply(variables, *args, cache=cache, method="hidden", **kw)
        hidden_BTD, cache = out
        logits: Any = self.model.apply(variables, hidden_BTD[:, -1], method="logits")
        return logits, cache


def take_rows(cache: Cache, rows: Array) -> Cache:
    """The cache of some of its rows, in a new order, each as often as named.

    Example:
      >>> cache = {"layers": {"layers": {"key": jnp.zeros((7, 2 * 3, 5, 4))}}, "mask": jnp.zeros((2, 5))}
      >>> jax.tree.map(jnp.shape, take_rows(cache, jnp.array([1, 1, 0, 0])))
      {'layers': {'layers': {'key': (7, 12, 5, 4)}}, 'mask': (4, 5)}
    """
    axis, n_rows = int("layers" in cache["layers"]), len(cache["mask"])

    def take(leaf: Array) -> Array:
        before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
        taken = jnp.take(leaf.reshape(*before, n_rows, -1, *after), rows, axis=axis)
        return taken.reshape(*before, -1, *after)

    rest = {
        name: jnp.take(part, rows, axis=0) if part.ndim else part for name, part in cache.items() if name != "layers"
    }
    return {"layers": jax.tree.map(take, cache["layers"]), **rest}
