"""A stack of transformer blocks, unrolled or scanned, with or without remat and a cache; and token embeddings.

Dimensions: `B` batch, `T` query time, `S` key time, `D` width, `V` vocabulary, `L` layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.choices import tell
from jaxdl.models.attention import Sight
from jaxdl.models.block import Block, Cache, Context, Layer, Norm
from jaxdl.models.checks import check, count_problem, name_problem
from jaxdl.models.layers import Dtype
from jaxdl.models.positions import distances, relative_buckets
from jaxdl.paths import Tree

LAYOUTS = ("auto", "unrolled", "scanned")
MOST_UNROLLED = 24
REMATS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_without_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


class Stack(nn.Module):
    """Layers one after the other, and a last norm.

    Paths: unrolled `layer_<i>/...`, scanned `layers/...` with a leading axis L (`stack_layers` and `unstack_layers`
    turn one into the other); `final_norm/{scale,bias}`; `relative/embedding` (buckets, H).

    Args:
      blocks: one a layer; they must be equal to be scanned.
      layout: "unrolled" (one layer's code after the other), "scanned" (one layer compiled, run L times) or "auto":
        scanned on a TPU and beyond 24 layers where the blocks are equal, else unrolled; the log says which.
      remat: what the backward pass computes anew to save memory: "none"; "full", everything within a layer; "dots",
        everything but products; "dots_without_batch", everything but products with parameters.
      has_final_norm: after the last layer.
      n_buckets, max_distance: of relative positions (Raffel et al. 2020); 0 buckets for none.

    Raises:
      ModelError: fields that make no network.

    Example:
      >>> stack = Stack((Block(width=8, n_heads=2, hidden=16, is_causal=True),) * 2)
      >>> x = jnp.ones((1, 3, 8))
      >>> variables = stack.init(jax.random.key(0), x)
      >>> y, cache = stack.apply(variables, x)
      >>> y.shape, cache, sorted(variables["params"])
      ((1, 3, 8), None, ['final_norm', 'layer_0', 'layer_1'])
    """

    blocks: Sequence[Block]
    layout: str = "auto"
    remat: str = "none"
    has_final_norm: bool = True
    n_buckets: int = 0
    max_distance: int = 128

    def __post_init__(self) -> None:
        uneven = self.layout == "scanned" and len(set(self.blocks)) > 1
        check(
            "Stack",
            None if self.blocks else "blocks=() is empty; give one block a layer.",
            name_problem("layout", self.layout, LAYOUTS),
            name_problem("remat", self.remat, REMATS),
            count_problem("n_buckets", self.n_buckets, least=0),
            "layout='scanned' needs equal blocks, and these differ; use 'unrolled'." if uneven else None,
        )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        *,
        mask: Array | None = None,
        lengths: Array | None = None,
        positions: Array | None = None,
        documents: Array | None = None,
        memory: Array | None = None,
        memory_mask: Array | None = None,
        cache: Cache | None = None,
        n_first: int | None = None,
        train: bool = False,
    ) -> tuple[Array, Cache | None]:
        """Runs all layers.

        Args:
          x_BTD: embedded tokens.
          mask: (B, T), 0 for padding.
          lengths: (B,) int, without a cache: a row's first tokens are real, and what follows is padding. `mask` can say
            the same, and cuDNN would read it for every pair of tokens.
          positions: (B, T) int, for rotary positions; by default those of `token_positions`.
          documents: (B, T) int; tokens see their own document only.
          memory: (B, S, D) for blocks with `has_cross`; `memory_mask` (B, S).
          cache: of `init_cache` or of the call before; the T tokens follow those in it.
          n_first: only the states of this many first tokens are returned, and an unrolled last layer computes no
            others: five sixths of the layer's work are saved where a head reads one token.
          train: dropout is on.

        Returns:
          `(x_BTD, cache)`, the cache with the T tokens in it, or None where none was given.
        """
        is_cached = lengths is not None and cache is not None
        check(
            "Stack",
            "lengths are for calls without a cache; give a mask with one." if is_cached else None,
            None if n_first is None else count_problem("n_first", n_first),
        )
        sight, new = _look(x_BTD, mask, documents, cache)
        sight = sight._replace(lengths=lengths)
        if positions is None:
            positions = token_positions(x_BTD.shape[1], mask, cache)
        context = Context(positions, sight, self._bias(sight), memory, memory_mask)
        layers = None if cache is None else cache["layers"]
        run = self._scan if resolve_layout(self.layout, self.blocks) == "scanned" else self._unroll
        x_BTD, layers = run(x_BTD, context, layers, n_first, train)
        x_BTD = x_BTD[:, :n_first]
        if self.has_final_norm:
            x_BTD = Norm(self.blocks[-1], name="final_norm")(x_BTD)
        return x_BTD, None if new is None else {**new, "layers": layers}

    def _bias(self, sight: Sight) -> Array | None:
        if not self.n_buckets:
            return None
        block = self.blocks[0]
        buckets_TS = relative_buckets(
            distances(sight.query_slots, sight.key_slots),
            n_buckets=self.n_buckets,
            max_distance=self.max_distance,
            is_causal=block.is_causal,
        )
        table = nn.Embed(self.n_buckets, block.n_heads, param_dtype=block.param_dtype, name="relative")
        return jnp.moveaxis(table(buckets_TS), -1, 0)[None]

    def _unroll(
        self, x_BTD: Array, context: Context, cache: Cache | None, n_first: int | None, train: bool
    ) -> tuple[Array, Cache | None]:
        new, is_cut = {}, jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1
        for i, block in enumerate(self.blocks):
            if n_first is not None and i == len(self.blocks) - 1 and not is_cut:
                context = context.first(n_first)
            layer = self._layer()(block, name=f"layer_{i}")
            x_BTD, new[f"layer_{i}"] = layer(x_BTD, context, None if cache is None else cache[f"layer_{i}"], train)
        return x_BTD, None if cache is None else new

    def _scan(
        self, x_BTD: Array, context: Context, cache: Cache | None, n_first: int | None, train: bool
    ) -> tuple[Array, Cache | None]:
        scanned = nn.scan(
            self._layer(is_scanned=True),
            variable_axes={"params": 0, "adapters": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, nn.broadcast),
            length=len(self.blocks),
        )
        layers = None if cache is None else cache["layers"]
        x_BTD, layers = scanned(self.blocks[0], name="layers")(x_BTD, context, layers, train)
        return x_BTD, None if cache is None else {"layers": layers}

    def _layer(self, is_scanned: bool = False) -> Any:
        if self.remat == "none":
            return _PlacedLayer
        return nn.remat(_PlacedLayer, policy=REMATS[self.remat], static_argnums=(4,), prevent_cse=not is_scanned)


class _PlacedLayer(Layer):
    """A layer whose states lie where the rows do; in a scan XLA would take the layout from the parameters instead."""

    def __call__(self, x_BTD: Array, context: Context, cache: Cache | None, train: bool) -> tuple[Array, Cache | None]:
        x_BTD, new = super().__call__(beside_rows(x_BTD), context, cache, train)
        return beside_rows(x_BTD), new


def beside_rows(x_BTD: Array) -> Array:
    """States spread as a batch is: rows over the axis `data` of the mesh in scope, tokens over `sequence`.

    Without a mesh in scope, or within `shard_map`, they are returned as they are.

    Example:
      >>> beside_rows(jnp.ones((1, 2, 3))).shape
      (1, 2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
        name if size % mesh.shape.get(name, 1) == 0 and name in mesh.auto_axes else None
        for name, size in zip(("data", "sequence"), x_BTD.shape, strict=False)
    ]
    if mesh.empty or axes == [None, None]:
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, jax.P(*axes))


def resolve_layout(layout: str, blocks: Sequence[Block]) -> str:
    """What "auto" means on this platform, said in the log.

    Example:
      >>> resolve_layout("auto", (Block(width=8, n_heads=2, hidden=16),) * 2)
      'unrolled'
    """
    if layout != "auto":
        return layout
    platform, n = jax.default_backend(), len(blocks)
    if len(set(blocks)) > 1:
        choice, reason = "unrolled", "the blocks differ"
    elif platform == "tpu":
        choice, reason = "scanned", "the platform is tpu"
    else:
        choice = "scanned" if n > MOST_UNROLLED else "unrolled"
        reason = f"{n} layers on {platform}, unrolled up to {MOST_UNROLLED}"
    tell("layers", choice, reason)
    return choice


def _look(x_BTD: Array, mask: Array | None, documents: Array | None, cache: Cache | None) -> tuple[Sight, Cache | None]:
    """Who sees whom in this call, and the cache's record of which slots hold tokens."""
    n_rows, n_new = x_BTD.shape[:2]
    slots = jnp.arange(n_new)
    if cache is None:
        return Sight(slots, slots, mask, documents, documents), None
    check("cache", None if documents is None else "documents cannot be kept apart in a cache; leave documents out.")
    added = jnp.ones((n_rows, n_new), bool) if mask is None else mask.astype(bool)
    filled = jax.lax.dynamic_update_slice_in_dim(cache["mask"], added, cache["length"], axis=1)
    sight = Sight(cache["length"] + slots, jnp.arange(filled.shape[1]), filled)
    return sight, {"mask": filled, "length": cache["length"] + n_new}


def token_positions(n_tokens: int, mask: Array | None = None, cache: Cache | None = None) -> Array:
    """Positions of new tokens: they count the real tokens before, so padding on the left shifts nothing.

    Args:
      n_tokens: T.
      mask: (B, T), 0 for padding, or None.
      cache: the tokens before.

    Returns:
      (B or 1, T) int32; 0 at padding on the left. Without a cache, padding on the right just counts on.

    Example:
      >>> token_positions(3, jnp.array([[0, 1, 1]])).tolist(), token_positions(3).tolist()
      ([[0, 0, 1]], [[0, 1, 2]])
    """
    before = jnp.zeros((1, 1), jnp.int32) if cache is None else jnp.sum(cache["mask"], 1, dtype=jnp.int32)[:, None]
    if mask is None:
        return before + jnp.arange(n_tokens)[None]
    return before + jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def init_cache(stack: Stack, n_rows: int, n_slots: int, *, n_memory: int = 0, dtype: Dtype = jnp.float32) -> Cache:
    """An empty cache of keys and values for `n_slots` tokens.

    Args:
      stack: the stack that will fill it.
      n_rows: B.
      n_slots: tokens that fit, padding included. More than that overwrite the last ones: the caller must not.
      n_memory: length of the memory that blocks with `has_cross` attend to.
      dtype: of keys and values.

    Returns:
      `{"layers", "mask" (B, n_slots) bool, "length" int32}`; keys and values are (B G, n_slots, K).

    Example:
      >>> stack = Stack((Block(width=8, n_heads=2, hidden=16, is_causal=True),))
      >>> init_cache(stack, 1, 5)["layers"]["layer_0"]["attention"]["key"].shape
      (2, 5, 4)
    """

    def empty(block: Block) -> Cache:
        _, n_groups, head_size = block.heads
        sizes = {"attention": n_slots, **({"cross": n_memory} if block.has_cross else {})}
        return {
            name: {part: jnp.zeros((n_rows * n_groups, n, head_size), dtype) for part in ("key", "value")}
            for name, n in sizes.items()
        }

    layers: Cache = {f"layer_{i}": empty(block) for i, block in enumerate(stack.blocks)}
    if resolve_layout(stack.layout, stack.blocks) == "scanned":
        layers = stack_layers(layers)
    return {"layers": layers, "mask": jnp.zeros((n_rows, n_slots), bool), "length": jnp.int32(0)}


def stack_layers(params: Tree) -> Tree:
    """Turns the unrolled layout into the scanned one: `layer_0 .. layer_<L-1>` become `layers`, with a leading axis.

    Args:
      params: nested dicts; every dict in it with children named `layer_<i>` is changed.

    Example:
      >>> stack_layers({"layer_0": {"w": jnp.zeros(2)}, "layer_1": {"w": jnp.ones(2)}})["layers"]["w"].tolist()
      [[0.0, 0.0], [1.0, 1.0]]
    """
    if not isinstance(params, Mapping):
        return params
    names = [f"layer_{i}" for i in range(len(_layer_names(params)))]
    rest = {name: stack_layers(child) for name, child in params.items() if name not in names}
    if not names:
        return rest
    check(
        "stack_layers", *(f"{name} is not there; layers are numbered from 0." for name in names if name not in params)
    )
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def unstack_layers(params: Tree) -> Tree:
    """The inverse of `stack_layers`, bit for bit.

    Example:
      >>> unstack_layers({"layers": {"w": jnp.arange(2)}})
      {'layer_0': {'w': Array(0, dtype=int32)}, 'layer_1': {'w': Array(1, dtype=int32)}}
    """
    if not isinstance(params, Mapping):
        return params
    rest = {name: unstack_layers(child) for name, child in params.items() if name != "layers"}
    if "layers" not in params:
        return rest
    n = len(jax.tree.leaves(params["layers"])[0])
    return {**rest, **{f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(n)}}


def _layer_names(params: Mapping[str, Any]) -> list[str]:
    return [name for name in params if name.startswith("layer_") and name.removeprefix("layer_").isdigit()]
