"""One transformer block, configured by value.

Dimensions: `B` batch, `T` query time, `S` key time, `D` width, `H` heads, `G` key/value heads, `K` head size,
`F` hidden.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.models.apart import apart, product_apart
from jaxdl.models.attention import IMPLEMENTATIONS, Sight, attend, attend_in_ring, ring_mesh
from jaxdl.models.checks import ModelError, count_problem, name_problem, rate_problem
from jaxdl.models.layers import ACTIVATIONS, Dtype, dropout, make_activation
from jaxdl.models.positions import Rotary, alibi_slopes, distances, rotate
from jaxdl.models.product import product
from jaxdl.models.standardize import standardized

Cache = dict[str, Any]
NORMS = ("layer", "rms", "rms_plus_one")
NORM_POSITIONS = ("pre", "post", "both")


@dataclass(frozen=True)
class Block:
    """What a transformer block is made of. The defaults are GPT-2's, but for the causal mask.

    Attributes:
      width: D, of the residual stream.
      n_heads: H, query heads.
      hidden: F, width of the feed-forward network.
      n_kv_heads: G, key/value heads; H where None. 1 is multi-query attention (Shazeer 2019).
      head_size: K; D // H where None.
      norm: "layer" (Ba et al. 2016), "rms" (Zhang & Sennrich 2019), or "rms_plus_one", which multiplies by 1 + scale.
      norm_position: "pre" (Xiong et al. 2020), "post" (Vaswani et al. 2017), or "both" around each branch.
      norm_epsilon: added to the variance.
      norm_bias: a bias in each layer norm.
      activation: of the feed-forward network, a name of `make_activation`.
      is_gated: the feed-forward network is `act(x gate) * (x up)` (Shazeer 2020): SwiGLU with silu, GEGLU with gelu.
      query_bias, output_bias, mlp_bias: biases of query/key/value, of the attention's output, of the feed-forward.
      has_query_key_norm: an RMS norm on each head's queries and keys.
      rotary: rotary positions, or None.
      has_alibi: ALiBi (Press et al. 2022).
      is_causal: a token sees none after it.
      window: a token sees only those nearer than this, itself included.
      has_cross: also attends to a memory, between attention and feed-forward.
      attention_scale: factor of the scores; K ** -0.5 where None.
      attention_softcap: scores become `cap * tanh(scores / cap)`.
      dropout_rate, attention_dropout_rate, hidden_dropout_rate: of each branch's output, of the attention
        probabilities, and of the feed-forward network's hidden units.
      attention: implementation, see `attend`.
      init_std, residual_init_std: of kernels, and of those that end a branch (init_std where None).
      dtype, param_dtype: of the computation and of the parameters.

    Example:
      >>> Block(width=64, n_heads=4, hidden=256, norm="rms", rotary=Rotary()).heads
      (4, 4, 16)
    """

    width: int
    n_heads: int
    hidden: int
    n_kv_heads: int | None = None
    head_size: int | None = None
    norm: str = "layer"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-5
    norm_bias: bool = True
    activation: str = "gelu_tanh"
    is_gated: bool = False
    query_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    has_query_key_norm: bool = False
    rotary: Rotary | None = None
    has_alibi: bool = False
    is_causal: bool = False
    window: int | None = None
    has_cross: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    hidden_dropout_rate: float = 0.0
    attention: str = "auto"
    init_std: float = 0.02
    residual_init_std: float | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ModelError.listing("Block", problems)

    def _problems(self) -> Iterator[str]:
        sizes = ("width", "n_heads", "hidden", "n_kv_heads", "head_size", "window")
        given = {name: getattr(self, name) for name in sizes}
        wrong_sizes = [problem for name, n in given.items() if n is not None and (problem := count_problem(name, n))]
        rates = ("dropout_rate", "attention_dropout_rate", "hidden_dropout_rate")
        others = [
            name_problem("norm", self.norm, NORMS),
            name_problem("norm_position", self.norm_position, NORM_POSITIONS),
            name_problem("activation", self.activation, ACTIVATIONS),
            name_problem("attention", self.attention, IMPLEMENTATIONS),
            *(rate_problem(name, getattr(self, name)) for name in rates),
        ]
        yield from wrong_sizes
        yield from (problem for problem in others if problem)
        if wrong_sizes:
            return
        if self.head_size is None and self.width % self.n_heads:
            yield f"width={self.width} does not divide over n_heads={self.n_heads}; use a multiple, or give head_size."
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            yield f"n_heads={self.n_heads} is no multiple of n_kv_heads={self.n_kv_heads}; use a divisor."
        if self.rotary is not None and self.heads[2] % 2:
            yield f"head_size={self.heads[2]} is odd, and rotary positions turn pairs; use an even one."

    @property
    def heads(self) -> tuple[int, int, int]:
        """(H, G, K)."""
        return self.n_heads, self.n_kv_heads or self.n_heads, self.head_size or self.width // self.n_heads

    def replace(self, **changes: Any) -> "Block":
        """A block with some fields changed."""
        return dataclasses.replace(self, **changes)


class Context(NamedTuple):
    """What all layers of a stack share in one call.

    Attributes:
      positions: (B or 1, T) int, of the tokens, for rotary positions.
      sight: who sees whom; a layer computes the states of as many first tokens as it has queries.
      bias: (1, H, T, S) added to the scores of the self-attention, or None.
      memory: (B, S, D) that a block with `has_cross` attends to; None where the cache holds its keys and values.
      memory_mask: (B, S) bool, or None.
    """

    positions: Array
    sight: Sight
    bias: Array | None = None
    memory: Array | None = None
    memory_mask: Array | None = None

    def first(self, n_queries: int) -> "Context":
        """Of the first queries alone; the keys stay."""
        bias = None if self.bias is None else self.bias[:, :, :n_queries]
        return self._replace(sight=self.sight.first(n_queries), bias=bias)


class Norm(nn.Module):
    """The norm of a block: `scale` and, for a layer norm with a bias, `bias`; statistics in float32 at least."""

    block: Block

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block, width = self.block, x.shape[-1]
        has_offset = block.norm == "rms_plus_one"
        init = nn.initializers.zeros if has_offset else nn.initializers.ones
        scale = self.param("scale", init, (width,), block.param_dtype)
        y = standardized(x, block.norm_epsilon, is_centered=block.norm == "layer")
        y = y * _row(scale + 1 if has_offset else scale, y)
        if block.norm == "layer" and block.norm_bias:
            y = y + _row(self.param("bias", nn.initializers.zeros, (width,), block.param_dtype), y)
        return y.astype(block.dtype)


def _row(vector: Array, x: Array) -> Array:
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


class Attention(nn.Module):
    """Self- or cross-attention: `query`, `key`, `value`, `output`, each a kernel (inputs, outputs) and perhaps a bias.

    With a cache, the keys and values of the call are written into it at the queries' slots. A cross-attention writes
    those of its memory once, and reads them where `context.memory` is None.
    """

    block: Block
    is_cross: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: Cache | None = None, *, train: bool = False
    ) -> tuple[Array, Cache | None]:
        block, (H, G, K), has_cache = self.block, self.block.heads, cache is not None
        query = self._heads("query", x_BTD[:, : len(context.sight.query_slots)], H)
        source = context.memory if self.is_cross else x_BTD
        if source is None:
            if cache is None:
                raise ModelError("cross-attention needs a memory; give the encoder's output, or a cache that holds it.")
            key, value = (_unflat(cache[name], len(x_BTD)) for name in ("key", "value"))
        else:
            key, value = self._heads("key", source, G), self._heads("value", source, G)
        if block.has_query_key_norm:
            query, key = Norm(_rms(block), name="query_norm")(query), Norm(_rms(block), name="key_norm")(key)
        if block.rotary is not None and not self.is_cross:
            query = rotate(query, context.positions[:, : query.shape[1]], block.rotary)
            key = rotate(key, context.positions, block.rotary)
        if cache is not None and source is not None:
            key, value, cache = self._remember(key, value, cache, context)
        mixed = self._mix(query, key, value, context, has_cache, train)
        flat = mixed.reshape(*mixed.shape[:2], H * K)
        return _dense(block, block.width, block.output_bias, "output", block.residual_init_std)(flat), cache

    def _mix(self, query: Array, key: Array, value: Array, context: Context, has_cache: bool, train: bool) -> Array:
        block, dropout_fn = self.block, self._dropout_fn(train)
        scale = block.heads[2] ** -0.5 if block.attention_scale is None else block.attention_scale
        is_within = not self.is_cross and not has_cache
        is_ring = is_within and context.sight.lengths is None
        mesh = ring_mesh(block.attention, query, context.bias, dropout_fn) if is_ring else None
        if mesh is not None:
            return attend_in_ring(
                mesh,
                query,
                key,
                value,
                context.sight,
                scale=scale,
                softcap=block.attention_softcap,
                is_causal=block.is_causal,
                window=block.window,
                slopes_H=jnp.asarray(alibi_slopes(block.n_heads)) if block.has_alibi else None,
            )
        is_square = is_within and query.shape[1] == key.shape[1]
        is_causal, sight = block.is_causal and is_square, context.sight
        hides_more = block.window is not None or sight.key_mask is not None or sight.query_documents is not None
        return attend(
            query,
            key,
            value,
            mask=self._mask(context),
            bias=self._bias(context),
            scale=scale,
            softcap=block.attention_softcap,
            dropout_fn=dropout_fn,
            implementation=block.attention,
            is_causal=is_causal,
            is_only_causal=is_causal and not hides_more,
            lengths=None if hides_more or not is_square else sight.lengths,
        )

    def _heads(self, name: str, x_BTD: Array, n: int) -> Array:
        block, size = self.block, self.block.heads[2]
        return _dense(block, n * size, block.query_bias, name)(x_BTD).reshape(*x_BTD.shape[:2], n, size)

    def _remember(self, key: Array, value: Array, cache: Cache, context: Context) -> tuple[Array, Array, Cache]:
        parts = {"key": _flat(key), "value": _flat(value)}
        if self.is_cross:
            return key, value, {name: part.astype(cache[name].dtype) for name, part in parts.items()}
        start = context.sight.query_slots[0]
        new = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], part.astype(cache[name].dtype), start, axis=1)
            for name, part in parts.items()
        }
        n_rows = len(key)
        return _unflat(new["key"], n_rows).astype(key.dtype), _unflat(new["value"], n_rows).astype(value.dtype), new

    def _mask(self, context: Context) -> Array | None:
        if self.is_cross:
            return None if context.memory_mask is None else context.memory_mask[:, None, None, :].astype(bool)
        return context.sight.mask(is_causal=self.block.is_causal, window=self.block.window)

    def _bias(self, context: Context) -> Array | None:
        if self.is_cross:
            return None
        if not self.block.has_alibi:
            return context.bias
        distance_TS = jnp.abs(distances(context.sight.query_slots, context.sight.key_slots))
        slopes = jnp.asarray(alibi_slopes(self.block.n_heads)).reshape(1, -1, 1, 1)
        bias = -slopes * distance_TS[None, None].astype(jnp.float32)
        return bias if context.bias is None else bias + context.bias

    def _dropout_fn(self, train: bool) -> Any:
        rate = self.block.attention_dropout_rate
        if not train or not rate:
            return None
        return lambda probabilities: dropout(probabilities, rate, train=True, name="dropout")


def _flat(x_BSGK: Array) -> Array:
    """(B G, S, K), the form that a cache has: that of the products in `attend`, so that XLA updates it in place."""
    B, S, G, K = x_BSGK.shape
    return jnp.swapaxes(x_BSGK, 1, 2).reshape(B * G, S, K)


def _unflat(x_NSK: Array, n_rows: int) -> Array:
    return jnp.swapaxes(x_NSK.reshape(n_rows, -1, *x_NSK.shape[1:]), 1, 2)


def _rms(block: Block) -> Block:
    return block if block.norm != "layer" else block.replace(norm="rms")


def _dense(
    block: Block, features: int, use_bias: bool, name: str, std: float | None = None, multiply: Any = product
) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=nn.initializers.normal(block.init_std if std is None else std),
        dtype=block.dtype,
        param_dtype=block.param_dtype,
        dot_general=multiply,
        name=name,
    )


class FeedForward(nn.Module):
    """`up`, activation, `down`; with `is_gated` the activation is of `gate`, and `up` multiplies it."""

    block: Block

    @nn.compact
    def __call__(self, x_BTD: Array, *, train: bool = False) -> Array:
        block, activation = self.block, make_activation(self.block.activation)
        x_BTF = _dense(block, block.hidden, block.mlp_bias, "up", multiply=product_apart)(x_BTD)
        if block.is_gated:
            x_BTF = activation(_dense(block, block.hidden, block.mlp_bias, "gate")(x_BTD)) * x_BTF
        else:
            x_BTF = activation(x_BTF)
        x_BTF = dropout(x_BTF, block.hidden_dropout_rate, train=train, name="dropout")
        return _dense(block, block.width, block.mlp_bias, "down", block.residual_init_std)(x_BTF)


class Layer(nn.Module):
    """Attention, perhaps cross-attention, and feed-forward, each a residual branch with its norm or norms.

    Paths: `attention_norm`, `attention/{query,key,value,output}`, `cross_norm`, `cross/...`, `mlp_norm`,
    `mlp/{up,gate,down}`, and with `norm_position="both"` also `attention_post_norm`, `mlp_post_norm`.

    All tokens are keys; where the context has fewer queries, only the states of those come out.
    """

    block: Block

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, cache: Cache | None, train: bool) -> tuple[Array, Cache | None]:
        block, new = self.block, dict(cache) if cache is not None else None

        def attention(x: Array, name: str) -> Array:
            own = None if cache is None else cache[name]
            out, own = Attention(block, is_cross=name == "cross", name=name)(x, context, own, train=train)
            if new is not None:
                new[name] = own
            return out

        x_BTD = self._branch(x_BTD, "attention", lambda x: attention(x, "attention"), train)
        if block.has_cross:
            x_BTD = self._branch(x_BTD, "cross", lambda x: attention(x, "cross"), train)
        return self._branch(x_BTD, "mlp", lambda x: FeedForward(block, name="mlp")(x, train=train), train), new

    def _branch(self, x_BTD: Array, name: str, fn: Any, train: bool) -> Array:
        block = self.block
        norm = Norm(block, name=f"{name}_norm")
        y_BTD = fn(x_BTD if block.norm_position == "post" else norm(x_BTD))
        if block.norm_position == "both":
            y_BTD = Norm(block, name=f"{name}_post_norm")(y_BTD)
        y_BTD = dropout(apart(y_BTD), block.dropout_rate, train=train, name=f"{name}_dropout")
        y_BTD = x_BTD[:, : y_BTD.shape[1]] + y_BTD
        return norm(y_BTD) if block.norm_position == "post" else y_BTD
