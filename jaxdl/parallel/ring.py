"""Attention over a sequence that is cut over devices: keys and values go round a ring.

Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv 2310.01889). Each device
keeps its queries. In each of n rounds it attends to the keys that it has and hands them on; the softmax is put
together from its running maximum and sum (Milakov & Gimelshein 2018). The backward pass goes round once more, and the
gradients of keys and values travel with them. No device ever holds more keys than its own and those on their way.

Dimensions: `B` batch, `T` query time of a device, `S` key time of a device, `H` query heads, `G` key/value heads
(H = G R), `K` head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdl.parallel.mesh import DATA, MODEL, SEQUENCE

Array = jax.Array


class Ends(NamedTuple):
    """What is known of queries, or of keys; that of keys travels with them.

    Attributes:
      slots: (T,) int, where they stand in the sequence.
      mask: (B, T) bool, False for padding, or None.
      documents: (B, T) int, or None; a query sees keys of its own document only.
    """

    slots: Array
    mask: Array | None = None
    documents: Array | None = None


class Rule(NamedTuple):
    """Who sees whom, and what becomes of a score; see `models.block.Block`."""

    scale: float
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None


def ring_attention(
    query_BTHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    *,
    mesh: Any,
    rule: Rule,
    queries: Ends,
    keys: Ends,
    slopes_H: Array | None = None,
) -> Array:
    """Softmax attention, equal to `models.attention.attend`, with queries and keys cut over the axis `sequence`.

    Rows are cut over `data`, and heads over `model`, where the mesh has such axes and they divide.

    Args:
      query_BTHK, key_BSGK, value_BSGK: global arrays; T = S divides by the devices of the axis.
      mesh: has the axis `sequence`; a `Mesh` or an `AbstractMesh`.
      rule: who sees whom. A query that sees nothing gets the mean of all values, as in `attend`.
      queries, keys: what it is decided by.
      slopes_H: (H,) float of ALiBi (Press et al. 2022), or None.

    Returns:
      (B, T, H, K), the dtype of the values.

    Example:
      >>> from jaxdl.parallel import make_mesh
      >>> x, ends = jnp.ones((1, 8, 2, 4)), Ends(jnp.arange(8))
      >>> ring_attention(x, x, 5 * x, mesh=make_mesh(sequence=8), rule=Rule(0.5), queries=ends, keys=ends).mean()
      Array(5., dtype=float32)
    """
    slopes = jnp.zeros(query_BTHK.shape[2]) if slopes_H is None else jnp.asarray(slopes_H)
    ring = _Ring(mesh, rule, _head_axis(mesh, query_BTHK.shape[2], key_BSGK.shape[2]), slopes_H is not None)
    return _ring(ring, query_BTHK, key_BSGK, value_BSGK, queries, keys, slopes)


class _Ring(NamedTuple):
    """What is no array."""

    mesh: Any
    rule: Rule
    heads: str | None
    has_slopes: bool

    def specs(self, queries: Ends, keys: Ends) -> tuple[Any, ...]:
        rows = DATA if DATA in self.mesh.shape else None
        tokens, ends = P(rows, SEQUENCE, self.heads), (P(SEQUENCE), P(rows, SEQUENCE), P(rows, SEQUENCE))
        known = [
            Ends._make(None if x is None else spec for x, spec in zip(e, ends, strict=True)) for e in (queries, keys)
        ]
        return tokens, P(rows, self.heads, SEQUENCE), (tokens, tokens, tokens, *known, P(self.heads))

    def map(self, fn: Any, in_specs: Any, out_specs: Any) -> Any:
        fn = functools.partial(fn, self)
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def pass_on(self, tree: Any) -> Any:
        n = self.mesh.shape[SEQUENCE]
        return jax.lax.ppermute(tree, SEQUENCE, [(i, (i + 1) % n) for i in range(n)])


def _head_axis(mesh: Any, n_heads: int, n_groups: int) -> str | None:
    n = mesh.shape.get(MODEL, 1)
    return MODEL if n > 1 and n_heads % n == 0 and n_groups % n == 0 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: _Ring, query: Array, key: Array, value: Array, queries: Ends, keys: Ends, slopes: Array) -> Array:
    return _forward(ring, query, key, value, queries, keys, slopes)[0]


def _forward(ring: _Ring, *args: Any) -> tuple[Array, Any]:
    tokens, rows, specs = ring.specs(args[3], args[4])
    mixed, largest, total = ring.map(_mix, specs, (tokens, rows, rows))(*args)
    return mixed, (args, mixed, largest, total)


def _backward(ring: _Ring, saved: Any, d_mixed: Array) -> tuple[Any, ...]:
    args, *known = saved
    tokens, rows, specs = ring.specs(args[3], args[4])
    back = ring.map(_unmix, (*specs, tokens, rows, rows, tokens), (tokens, tokens, tokens))
    return *back(*args, *known, d_mixed), None, None, None


_ring.defvjp(_forward, _backward)


def _mix(
    ring: _Ring, query: Array, key: Array, value: Array, queries: Ends, keys: Ends, slopes: Array
) -> tuple[Array, Array, Array]:
    """The forward pass of a device; also the largest score and the sum of each softmax, (B, H, T).

    They stay apart: where all is hidden, the logarithm of the sum would vanish beside the score.
    """
    (B, T, H, K), dtype = query.shape, jnp.promote_types(query.dtype, jnp.float32)

    def round_(carry: Any, _: None) -> tuple[Any, None]:
        (mixed, largest, total), (key, value, keys) = carry
        scores = _scores(ring, query, key, queries, keys, slopes)
        new_largest = jnp.maximum(largest, scores.max(-1))
        kept = jnp.exp(largest - new_largest)
        shares = jnp.exp(scores - new_largest[..., None])
        mixed = mixed * kept[..., None] + _weigh(shares, value)
        return ((mixed, new_largest, total * kept + shares.sum(-1)), ring.pass_on((key, value, keys))), None

    empty = (jnp.zeros((B, H, T, K), dtype), jnp.full((B, H, T), -jnp.inf, dtype), jnp.zeros((B, H, T), dtype))
    n = ring.mesh.shape[SEQUENCE]
    ((mixed, largest, total), _), _ = jax.lax.scan(round_, (empty, (key, value, keys)), length=n)
    return jnp.swapaxes(mixed / total[..., None], 1, 2).astype(value.dtype), largest, total


def _unmix(
    ring: _Ring,
    query: Array,
    key: Array,
    value: Array,
    queries: Ends,
    keys: Ends,
    slopes: Array,
    mixed: Array,
    largest: Array,
    total: Array,
    d_mixed: Array,
) -> tuple[Array, Array, Array]:
    """The backward pass of a device (Dao et al. 2022, "FlashAttention", appendix B.2, over the ring)."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    d_mixed_BHTK = jnp.swapaxes(d_mixed, 1, 2).astype(dtype)
    along_BHT = jnp.sum(d_mixed_BHTK * jnp.swapaxes(mixed, 1, 2).astype(dtype), -1)

    def round_(carry: Any, _: None) -> tuple[Any, None]:
        d_query, (key, value, keys, d_key, d_value) = carry
        scores, pull = jax.vjp(lambda q, k: _scores(ring, q, k, queries, keys, slopes), query, key)
        shares = jnp.exp(scores - largest[..., None]) / total[..., None]
        d_shares, more_value = _weigh_back(shares, value, d_mixed_BHTK)
        more_query, more_key = pull(shares * (d_shares - along_BHT[..., None]))
        travelling = (key, value, keys, d_key + more_key.astype(dtype), d_value + more_value)
        return (d_query + more_query.astype(dtype), ring.pass_on(travelling)), None

    zeros = [jnp.zeros(x.shape, dtype) for x in (query, key, value)]
    carry = (zeros[0], (key, value, keys, zeros[1], zeros[2]))
    (d_query, (_, _, _, d_key, d_value)), _ = jax.lax.scan(round_, carry, length=ring.mesh.shape[SEQUENCE])
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)


def _scores(ring: _Ring, query: Array, key: Array, queries: Ends, keys: Ends, slopes_H: Array) -> Array:
    """(B, H, T, S) float32 at least; hidden ones get the least number added, as in `attend`."""
    (B, T, H, K), (S, G) = query.shape, key.shape[1:3]
    dtype, rule = jnp.promote_types(query.dtype, jnp.float32), ring.rule
    grouped = (query * rule.scale).reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, key, preferred_element_type=dtype).reshape(B, H, T, S)
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    distance_TS = queries.slots[:, None] - keys.slots[None, :]
    if ring.has_slopes:
        scores = scores - slopes_H.astype(dtype)[None, :, None, None] * jnp.abs(distance_TS)[None, None].astype(dtype)
    seen = _seen(rule, distance_TS, queries, keys)
    return scores if seen is None else scores + jnp.where(seen, jnp.zeros((), dtype), jnp.finfo(dtype).min)


def _seen(rule: Rule, distance_TS: Array, queries: Ends, keys: Ends) -> Array | None:
    """(B or 1, 1, T, S) bool, or None where all is seen."""
    parts = []
    if rule.is_causal:
        parts.append((distance_TS >= 0)[None, None])
    if rule.window is not None:
        parts.append((jnp.abs(distance_TS) < rule.window)[None, None])
    if keys.mask is not None:
        parts.append(keys.mask[:, None, None, :].astype(bool))
    if queries.documents is not None and keys.documents is not None:
        parts.append(queries.documents[:, None, :, None] == keys.documents[:, None, None, :])
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _weigh(shares_BHTS: Array, value_BSGK: Array) -> Array:
    """(B, H, T, K), in the dtype of the shares."""
    (B, H, T, S), (G, K) = shares_BHTS.shape, value_BSGK.shape[2:]
    grouped = shares_BHTS.reshape(B, G, H // G, T, S).astype(value_BSGK.dtype)
    mixed = jnp.einsum("bgrts,bsgk->bgrtk", grouped, value_BSGK, preferred_element_type=shares_BHTS.dtype)
    return mixed.reshape(B, H, T, K)


def _weigh_back(shares_BHTS: Array, value_BSGK: Array, d_mixed_BHTK: Array) -> tuple[Array, Array]:
    """The gradients of `_weigh`, both in the dtype of the shares."""
    _, pull = jax.vjp(_weigh, shares_BHTS, value_BSGK.astype(shares_BHTS.dtype))
    d_shares, d_value = pull(d_mixed_BHTK)
    return d_shares, d_value
