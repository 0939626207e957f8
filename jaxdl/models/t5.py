"""T5 (Raffel et al. 2020): an encoder, and a decoder that attends to it; and its version 1.1 (Shazeer 2020).

Dimensions: `B` batch, `S` source time, `T` target time, `D` width, `V` vocabulary, `L` layers.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.block import Block, Cache
from jaxdl.models.checks import ModelError, check, count_problem, name_problem
from jaxdl.models.embedding import Embed, padded_size
from jaxdl.models.layers import Dtype
from jaxdl.models.transformer import LAYOUTS, REMATS, Stack, init_cache, token_positions

HEADS = ("sequence_to_sequence", "encode")


def t5_block(width: int, n_heads: int, hidden: int, *, is_gated: bool = False, **fields: Any) -> Block:
    """The block of T5: RMS norms, no biases, scores that are not scaled, ReLU; in version 1.1 gated GELU.

    Args:
      width: D.
      n_heads: H.
      hidden: F.
      is_gated: version 1.1.
      fields: further fields of `Block`, such as `head_size` or the rates of dropout.

    Example:
      >>> t5_block(8, 2, 16).activation, t5_block(8, 2, 16, is_gated=True).activation
      ('relu', 'gelu_tanh')
    """
    own: dict[str, Any] = {"norm": "rms", "norm_epsilon": 1e-6, "attention_scale": 1.0, "init_std": width**-0.5}
    own |= {"query_bias": False, "output_bias": False, "mlp_bias": False, "residual_init_std": hidden**-0.5}
    own |= {"activation": "gelu_tanh" if is_gated else "relu", "is_gated": is_gated}
    return Block(width=width, n_heads=n_heads, hidden=hidden, **{**own, **fields})


class T5(nn.Module):
    """Relative positions, shared by the layers of a stack, tell where a token stands; there are no others.

    Heads, by what `model(tokens, inputs=...)` returns:
      "sequence_to_sequence": logits of the next target token (B, T, V).
      None: the decoder's hidden states (B, T, D).
      "encode": the encoder's hidden states (B, S, D); there is no decoder.

    Paths: `embed/token/embedding` (padded V, D); `encoder/...` and `decoder/...` of `Stack`, with
    `relative/embedding` (buckets, H) and in the decoder `layer_<i>/cross/...`; `head/kernel` where it is not tied.

    Args:
      block: of every layer, see `t5_block`; whether it is causal and attends to a memory follows from the stack.
      n_layers: L, of the encoder.
      vocab_size: V.
      n_decoder_layers: as many as the encoder's where None.
      head: a name above, or None.
      is_tied: the logits are products with the token embedding; not in version 1.1.
      is_output_scaled: hidden states are multiplied by D**-0.5 before the head; not in version 1.1.
      n_buckets, max_distance: of the relative positions.
      layout, remat: see `Stack`.

    Raises:
      ModelError: fields that make no network (at construction), or inputs that do not fit it.

    Example:
      >>> import jax
      >>> model = T5(t5_block(8, 2, 16), n_layers=1, vocab_size=11)
      >>> tokens, targets = jnp.array([[4, 5, 1]]), jnp.array([[7, 1]])
      >>> inputs = shift_right(targets)
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens, inputs=inputs)
      >>> model.apply(variables, tokens, inputs=inputs).shape, sorted(variables["params"])
      ((1, 2, 11), ['decoder', 'embed', 'encoder'])
    """

    block: Block
    n_layers: int
    vocab_size: int
    n_decoder_layers: int | None = None
    head: str | None = "sequence_to_sequence"
    is_tied: bool = True
    is_output_scaled: bool = True
    n_buckets: int = 32
    max_distance: int = 128
    layout: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        of_stack = [name for name in ("is_causal", "has_cross") if getattr(self.block, name)]
        decoder_layers = self.n_decoder_layers
        check(
            "T5",
            count_problem("n_layers", self.n_layers),
            count_problem("vocab_size", self.vocab_size),
            None if decoder_layers is None else count_problem("n_decoder_layers", decoder_layers),
            None if self.head is None else name_problem("head", self.head, HEADS),
            count_problem("n_buckets", self.n_buckets, least=4),
            count_problem("max_distance", self.max_distance, least=self.n_buckets),
            name_problem("layout", self.layout, LAYOUTS),
            name_problem("remat", self.remat, REMATS),
            *(f"block.{name}=True is the decoder's affair, which sets it itself; leave it out." for name in of_stack),
        )
        super().__post_init__()

    def setup(self) -> None:
        self.embed = Embed(self.block.replace(init_std=1.0), self.vocab_size, name="embed")
        self.encoder = self._stack(self.n_layers, name="encoder")
        if self.head != "encode":
            self.decoder = self._decoder(name="decoder")
        if self.head == "sequence_to_sequence" and not self.is_tied:
            block, n = self.block, padded_size(self.vocab_size)
            init, own = nn.initializers.normal(1.0), {"dtype": block.dtype, "param_dtype": block.param_dtype}
            self.output = nn.Dense(n, use_bias=False, kernel_init=init, **own, name="head")
        self.last_dropout = nn.Dropout(self.block.dropout_rate, name="last_dropout")

    def _stack(self, n_layers: int, *, is_decoder: bool = False, **kw: Any) -> Stack:
        block = self.block.replace(is_causal=is_decoder, has_cross=is_decoder)
        buckets: dict[str, Any] = {"n_buckets": self.n_buckets, "max_distance": self.max_distance}
        return Stack((block,) * n_layers, layout=self.layout, remat=self.remat, **buckets, **kw)

    def _decoder(self, **kw: Any) -> Stack:
        n_layers = self.n_layers if self.n_decoder_layers is None else self.n_decoder_layers
        return self._stack(n_layers, is_decoder=True, **kw)

    def __call__(
        self,
        tokens: Array | None,
        *,
        mask: Array | None = None,
        inputs: Array | None = None,
        inputs_mask: Array | None = None,
        cache: Cache | None = None,
        memory: Array | None = None,
        train: bool = False,
    ) -> Any:
        """Runs the model.

        Args:
          tokens: (B, S) int, the source; None where `memory` or a cache that was filled before stands for it.
          mask: (B, S), 0 for padding of the source; with a cache, only the call that has the source needs it.
          inputs: (B, T) int, what the decoder reads: the targets, shifted right by `shift_right`.
          inputs_mask: (B, T), 0 for padding.
          cache: of `init_cache` or of the call before; the T inputs follow those in it.
          memory: (B, S, D), the result of `encode`.
          train: dropout is on.

        Returns:
          What the head gives, see the class; with a cache, `(output, cache)`.
        """
        if self.head == "encode":
            return self.encode(tokens, mask=mask, train=train)
        given: dict[str, Any] = {
            "mask": mask,
            "inputs": inputs,
            "inputs_mask": inputs_mask,
            "cache": cache,
            "memory": memory,
        }
        out = self.hidden(tokens, **given, train=train)
        if self.head is None:
            return out
        return self.logits(out) if cache is None else (self.logits(out[0]), out[1])

    def encode(self, tokens: Array | None, *, mask: Array | None = None, train: bool = False) -> Array:
        """The encoder's states (B, S, D) of the source (B, S)."""
        x_BSD = self.encoder(self._embed(tokens, train), mask=mask, train=train)[0]
        return self.last_dropout(x_BSD, deterministic=not train)

    def _embed(self, tokens: Array | None, train: bool) -> Array:
        if tokens is None:
            raise ModelError("T5: there are no tokens; give the source (batch, time), and inputs to the decoder.")
        return self.embed(tokens, token_positions(tokens.shape[-1]), train=train)

    def hidden(
        self,
        tokens: Array | None,
        *,
        mask: Array | None = None,
        inputs: Array | None = None,
        inputs_mask: Array | None = None,
        cache: Cache | None = None,
        memory: Array | None = None,
        train: bool = False,
    ) -> Any:
        """The decoder's states (B, T, D); arguments as of a call, and with a cache `(states, cache)`."""
        check("T5", *self._input_problems(tokens, inputs, cache, memory))
        if memory is None and tokens is not None:
            memory = self.encode(tokens, mask=mask, train=train)
        memory_mask = mask if cache is None else _remember_mask(cache, mask, memory)
        x_BTD, new = self.decoder(
            self._embed(inputs, train),
            mask=inputs_mask,
            memory=memory,
            memory_mask=memory_mask,
            cache=cache,
            train=train,
        )
        x_BTD = self.last_dropout(x_BTD, deterministic=not train)
        return x_BTD if new is None else (x_BTD, {**new, "memory_mask": memory_mask})

    def _input_problems(
        self, tokens: Array | None, inputs: Array | None, cache: Cache | None, memory: Array | None
    ) -> list[str | None]:
        has_source = tokens is not None or memory is not None or cache is not None
        both = "tokens and memory are both given, and memory is the encoder's output for tokens; give one of them."
        return [
            "head='encode' has no decoder; use head=None or 'sequence_to_sequence'." if self.head == "encode" else None,
            None if inputs is not None else "there are no inputs; give the targets, shifted right by `shift_right`.",
            None if has_source else "there is no source; give tokens, memory, or a cache that was filled before.",
            both if tokens is not None and memory is not None else None,
        ]

    def logits(self, hidden: Array) -> Array:
        """The decoder's states (..., D) -> logits of the next token (..., V), float32 at least."""
        if self.is_output_scaled:
            hidden = hidden * jnp.asarray(self.block.width**-0.5, hidden.dtype)
        if self.is_tied:
            return self.embed.logits(hidden)
        logits = self.output(hidden)[..., : self.vocab_size]
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    @nn.nowrap
    def init_cache(self, n_rows: int, n_slots: int, *, n_memory: int, dtype: Dtype | None = None) -> Cache:
        """An empty cache for the decoder.

        Args:
          n_rows: B.
          n_slots: target tokens that fit, padding included.
          n_memory: S, the length of the source.
          dtype: of keys and values, the block's where None.

        Returns:
          What `transformer.init_cache` gives, and `memory_mask` (B, S) bool.
        """
        dtype = self.block.dtype if dtype is None else dtype
        cache = init_cache(self._decoder(parent=None), n_rows, n_slots, n_memory=n_memory, dtype=dtype)
        return {**cache, "memory_mask": jnp.ones((n_rows, n_memory), bool)}


def _remember_mask(cache: Cache, mask: Array | None, memory: Array | None) -> Array:
    known = cache["memory_mask"]
    if memory is None:
        return known
    problem = (
        f"the source has {memory.shape[1]} tokens and the cache is for n_memory={known.shape[1]}; make them equal."
    )
    check("T5", problem if memory.shape[1] != known.shape[1] else None)
    return jnp.ones_like(known) if mask is None else mask.astype(bool)


def shift_right(targets_BT: Array, start: int = 0) -> Array:
    """What the decoder reads: a start token, then the targets but for the last.

    Args:
      targets_BT: (B, T) int.
      start: T5's is its padding, 0.

    Example:
      >>> shift_right(jnp.array([[7, 8, 1]])).tolist()
      [[0, 7, 8]]
    """
    return jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start)


def t5_small(**fields: Any) -> T5:
    """The published model of 60 million parameters, version 1.0; `fields` change others, such as `head`.

    Example:
      >>> t5_small(head="encode").block.heads
      (8, 8, 64)
    """
    block = t5_block(512, 8, 2048, dropout_rate=0.1, attention_dropout_rate=0.1, hidden_dropout_rate=0.1)
    return T5(**{"block": block, "n_layers": 6, "vocab_size": 32128, **fields})
