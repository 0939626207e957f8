"""Attention: who sees whom, and the weighted sum, in the form that is fastest on the device.

Dimensions: `B` batch, `T` query time, `S` key time, `H` query heads, `G` key/value heads (H = G * R), `K` head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.choices import tell
from jaxdl.models.attention_gpu import cudnn_attention
from jaxdl.models.checks import ModelError
from jaxdl.models.positions import distances

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "ring")
BLOCKS, LEAST_BLOCK = 4, 32


class Sight(NamedTuple):
    """What decides which keys a query sees, shared by all layers.

    Attributes:
      query_slots: (T,) int, where the queries stand in the key axis.
      key_slots: (S,) int.
      key_mask: (B, S) bool, False for padding; None where all are real.
      query_documents, key_documents: (B, T) and (B, S) int; a query sees keys of its own document only. None: one.
      lengths: (B,) int, the keys of each row that are real: the first ones. None where `key_mask` says it, or all are.
    """

    query_slots: Array
    key_slots: Array
    key_mask: Array | None = None
    query_documents: Array | None = None
    key_documents: Array | None = None
    lengths: Array | None = None

    def first(self, n_queries: int) -> "Sight":
        """Of the first queries alone.

        Example:
          >>> sight = Sight(jnp.arange(3), jnp.arange(3)).first(1)
          >>> sight.mask(is_causal=True, window=None)[0, 0].astype(int).tolist()
          [[1, 0, 0]]
        """
        documents = None if self.query_documents is None else self.query_documents[:, :n_queries]
        return self._replace(query_slots=self.query_slots[:n_queries], query_documents=documents)

    def mask(self, *, is_causal: bool, window: int | None) -> Array | None:
        """True where a query sees a key: (B or 1, 1, T or 1, S) bool, or None where it sees all.

        Args:
          is_causal: a query sees no key after it.
          window: a query sees only keys nearer than this many tokens, itself included.

        Example:
          >>> sight = Sight(jnp.arange(3), jnp.arange(3), jnp.array([[False, True, True]]))
          >>> sight.mask(is_causal=True, window=None)[0, 0].astype(int).tolist()
          [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
        """
        parts = []
        distance_TS = distances(self.query_slots, self.key_slots)
        if is_causal:
            parts.append((distance_TS >= 0)[None, None])
        if window is not None:
            parts.append((jnp.abs(distance_TS) < window)[None, None])
        if self.key_mask is not None:
            parts.append(self.key_mask[:, None, None, :].astype(bool))
        if self.lengths is not None:
            parts.append((self.key_slots[None] < self.lengths[:, None])[:, None, None])
        if self.query_documents is not None and self.key_documents is not None:
            parts.append(self.query_documents[:, None, :, None] == self.key_documents[:, None, None, :])
        return functools.reduce(jnp.logical_and, parts) if parts else None


def attend(
    query_BTHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float,
    softcap: float | None = None,
    dropout_fn: Any = None,
    implementation: str = "auto",
    is_causal: bool = False,
    is_only_causal: bool = False,
    lengths: Array | None = None,
) -> Array:
    """Softmax attention (Vaswani et al. 2017, eq. 1), multi-, grouped- (Ainslie et al. 2023) or multi-query.

    Args:
      query_BTHK: queries; H must be a multiple of G.
      key_BSGK, value_BSGK: keys and values.
      mask: (B or 1, 1, T or 1, S) bool, True where a query sees a key. A query that sees nothing gets the mean of all.
      bias: (B or 1, H or 1, T, S), added to the scaled scores.
      scale: factor of the scores, usually `K ** -0.5`.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      dropout_fn: applied to the probabilities, (B, H, T, S).
      implementation: "xla", "cudnn" (flash attention on an NVIDIA GPU) or "auto", which says in the log what it took.
        "ring" is "auto" here: what can go round a ring of devices is not sent here, see `attend_in_ring`.
      is_causal: the mask lets no query see keys beyond its own place (T = S), so that work on those can be left out.
      is_only_causal: and it hides nothing else, so that cuDNN needs no mask.
      lengths: (B,) int, where given: the mask hides the keys from there on and nothing else but what `is_only_causal`
        says, so that cuDNN needs no mask.

    Returns:
      (B, T, H, K), the dtype of the values.

    Raises:
      ModelError: heads that do not divide, or an implementation that cannot do what is asked.

    Example:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> attend(x, x, 5 * x, scale=0.5).shape, float(attend(x, x, 5 * x, scale=0.5)[0, 0, 0, 0])
      ((1, 3, 2, 4), 5.0)
    """
    n_heads, n_groups = query_BTHK.shape[2], key_BSGK.shape[2]
    if n_heads % n_groups:
        raise ModelError(f"{n_heads} query heads do not divide over {n_groups} key/value heads; use a multiple.")
    if _choose(implementation, query_BTHK, softcap, dropout_fn) == "cudnn":
        mask = None if is_only_causal or lengths is not None else mask
        own: dict[str, Any] = {"mask": mask, "bias": bias, "scale": scale, "lengths": lengths}
        return cudnn_attention(query_BTHK, key_BSGK, value_BSGK, is_causal=is_only_causal, **own)
    added = _added(mask, bias, jnp.promote_types(query_BTHK.dtype, jnp.float32))
    n_blocks = _n_blocks(query_BTHK.shape[1], key_BSGK.shape[1], dropout_fn, is_causal)
    return _attend_xla(query_BTHK, key_BSGK, value_BSGK, added, scale, softcap, dropout_fn, n_blocks)


def _choose(implementation: str, query_BTHK: Array, softcap: float | None, dropout_fn: Any) -> str:
    dtype = query_BTHK.dtype
    own = {
        "scores are soft-capped": softcap is not None,
        "probabilities are dropped out": dropout_fn is not None,
        "a single query": query_BTHK.shape[1] == 1,
    }
    obstacles = [*_obstacles(dtype, query_BTHK.shape[-1]), *(reason for reason, is_met in own.items() if is_met)]
    implementation = "auto" if implementation == "ring" else implementation
    if implementation == "cudnn" and obstacles:
        raise ModelError(f"attention='cudnn' cannot be used: {'; '.join(obstacles)}. Use 'auto' or 'xla'.")
    choice = "xla" if obstacles or implementation == "xla" else "cudnn"
    reason = "asked for" if implementation != "auto" else obstacles[0] if obstacles else f"{dtype} on a GPU"
    tell("attention", choice, reason)
    return choice


def _obstacles(dtype: Any, head_size: int) -> list[str]:
    """Why cuDNN is out of the question whatever is attended to."""
    return [
        reason
        for reason, is_met in {
            f"the platform is {jax.default_backend()}": jax.default_backend() != "gpu",
            f"{dtype} is neither bfloat16 nor float16": dtype not in (jnp.bfloat16, jnp.float16),
            f"the head size {head_size} is no multiple of 8 up to 128": head_size % 8 != 0 or head_size > 128,
        }.items()
        if is_met
    ]


def wants_even_length(implementation: str, dtype: Any, head_size: int, n_tokens: int) -> bool:
    """Whether cuDNN will attend to an odd number of tokens, each time adding one and taking it away again."""
    is_cudnn = implementation in ("auto", "cudnn") and not _obstacles(jnp.dtype(dtype), head_size)
    return is_cudnn and n_tokens % 2 == 1 and jax.sharding.get_abstract_mesh().shape.get("sequence", 1) == 1


def ring_mesh(implementation: str, query_BTHK: Array, bias: Array | None, dropout_fn: Any) -> Any:
    """The mesh whose axis `sequence` self-attention goes round, or None.

    A step that `jit_step` or `fit` compiles for a mesh is traced with the mesh in scope; so is what is compiled under
    `jax.set_mesh(mesh)`. Elsewhere there is no axis, and "ring" is what a single device does.

    Args:
      implementation: "ring" and "auto" take the ring where the axis has several devices.
      query_BTHK, bias, dropout_fn: as for `attend`.

    Raises:
      ModelError: "ring" is asked for and cannot be.
    """
    mesh = jax.sharding.get_abstract_mesh()
    n, n_data = (mesh.shape.get(axis, 1) for axis in ("sequence", "data"))
    if n == 1 or implementation not in ("auto", "ring"):
        return None
    n_rows, n_tokens = query_BTHK.shape[:2]
    obstacles = [
        reason
        for reason, is_met in {
            f"{n_tokens} tokens do not divide over the {n} devices of the axis 'sequence'": n_tokens % n != 0,
            f"{n_rows} rows do not divide over the {n_data} devices of the axis 'data'": n_rows % n_data != 0,
            "scores have a learned bias": bias is not None,
            "probabilities are dropped out": dropout_fn is not None,
        }.items()
        if is_met
    ]
    if implementation == "ring" and obstacles:
        raise ModelError(f"attention='ring' cannot be used: {'; '.join(obstacles)}. Use 'auto' or 'xla'.")
    if obstacles:
        tell("attention", "no ring", obstacles[0])
        return None
    tell("attention", "ring", f"the axis 'sequence' of the mesh has {n} devices")
    return mesh


def attend_in_ring(
    mesh: Any,
    query_BTHK: Array,
    key_BTGK: Array,
    value_BTGK: Array,
    sight: Sight,
    *,
    scale: float,
    softcap: float | None,
    is_causal: bool,
    window: int | None,
    slopes_H: Array | None,
) -> Array:
    """`attend` with the sequence cut over the axis `sequence` of a mesh, see `parallel.ring`.

    Args:
      mesh: of `ring_mesh`.
      query_BTHK, key_BTGK, value_BTGK, scale, softcap: as for `attend`.
      sight, is_causal, window: who sees whom.
      slopes_H: (H,) of ALiBi, or None.

    Returns:
      (B, T, H, K), the dtype of the values.
    """
    from jaxdl.parallel.ring import Ends, Rule, ring_attention  # which builds on the models

    return ring_attention(
        query_BTHK,
        key_BTGK,
        value_BTGK,
        mesh=mesh,
        rule=Rule(scale, is_causal, window, softcap),
        queries=Ends(sight.query_slots, None, sight.query_documents),
        keys=Ends(sight.key_slots, sight.key_mask, sight.key_documents),
        slopes_H=slopes_H,
    )


def _attend_xla(
    query_BTHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    bias: Array | None,
    scale: float,
    softcap: float | None,
    dropout_fn: Any,
    n_blocks: int,
) -> Array:
    """Batched products over (B G, R T, K): XLA on a CPU runs them twice as fast as an einsum over BTHK.

    With several blocks of queries, those of a block get the keys up to its end.
    """
    T, S = query_BTHK.shape[1], key_BSGK.shape[1]
    query_BHTK = jnp.swapaxes(query_BTHK * scale, 1, 2)
    key_BGSK, value_BGSK = (jnp.swapaxes(x, 1, 2) for x in (key_BSGK, value_BSGK))
    parts, size = [], T // n_blocks
    for start in range(0, T, size):
        stop, n = start + size, S if n_blocks == 1 else start + size
        near = None if bias is None else _cut(bias, start, stop, n)
        queries, keys, values = query_BHTK[:, :, start:stop], key_BGSK[:, :, :n], value_BGSK[:, :, :n]
        parts.append(_mix(queries, keys, values, near, softcap, dropout_fn))
    mixed_BHTK = parts[0] if n_blocks == 1 else jnp.concatenate(parts, 2)
    return jnp.swapaxes(mixed_BHTK, 1, 2)


def _cut(bias: Array, start: int, stop: int, n: int) -> Array:
    return (bias if bias.shape[2] == 1 else bias[:, :, start:stop])[..., :n]


def _mix(
    query_BHTK: Array, key_BGSK: Array, value_BGSK: Array, bias: Array | None, softcap: float | None, dropout_fn: Any
) -> Array:
    """The softmax-weighted sums, (B, H, T, K); `N` is batch and groups, one axis or two."""
    (B, H, T, K), (G, S) = query_BHTK.shape, key_BGSK.shape[1:3]
    dtype, M, N = jnp.promote_types(query_BHTK.dtype, jnp.float32), H // G * T, _leading(B, G)
    query_NMK, key_NSK, value_NSK = (x.reshape(*N, -1, K) for x in (query_BHTK, key_BGSK, value_BGSK))
    i, batch = len(N), (tuple(range(len(N))),) * 2
    scores_NMS = jax.lax.dot_general(query_NMK, key_NSK, (((i + 1,), (i + 1,)), batch), preferred_element_type=dtype)
    if softcap is not None:
        scores_NMS = softcap * jnp.tanh(scores_NMS / softcap)
    if bias is not None:
        scores_NMS = scores_NMS + _lead(_in_rows(bias, query_BHTK.shape, G), N)
    weights_NMS, rate_NM1 = _softmax(scores_NMS)
    weights_NMS = weights_NMS.astype(value_NSK.dtype)
    if dropout_fn is not None:
        weights_NMS = dropout_fn(weights_NMS.reshape(B, H, T, S)).reshape(*N, M, S)
    mixed_NMK = jax.lax.dot_general(weights_NMS, value_NSK, (((i + 1,), (i,)), batch))
    if rate_NM1 is not None:
        mixed_NMK = (mixed_NMK * rate_NM1).astype(value_NSK.dtype)
    return mixed_NMK.reshape(B, H, T, K)


def _softmax(scores_NMS: Array) -> tuple[Array, Array | None]:
    """Weights of the values and the factor of their sum, None for 1.

    On a CPU what is T times K is divided and not what is T times S, as Rabe & Staats 2021 do: attention takes two
    thirds of the time, with its gradient the same.
    """
    if jax.default_backend() != "cpu":
        return jax.nn.softmax(scores_NMS, axis=-1), None
    weights_NMS = jnp.exp(scores_NMS - jax.lax.stop_gradient(scores_NMS.max(-1, keepdims=True)))
    return weights_NMS, 1 / weights_NMS.sum(-1, keepdims=True)


def _leading(B: int, G: int) -> tuple[int, ...]:
    """Batch and groups as one axis, so that a cache is updated in place; as two on a mesh, which may cut either."""
    return (B * G,) if jax.sharding.get_abstract_mesh().empty else (B, G)


def _lead(bias_BGMS: Array, N: tuple[int, ...]) -> Array:
    b, g, *rest = bias_BGMS.shape
    if len(N) == 2 or b == g == 1:
        return bias_BGMS if len(N) == 2 else bias_BGMS[0]
    G = N[0] // b if g == 1 else g
    return jnp.broadcast_to(bias_BGMS, (N[0] // G, G, *rest)).reshape(N[0], *rest)


def _in_rows(bias: Array, shape: tuple[int, ...], G: int) -> Array:
    """(B or 1, H or 1, T or 1, S) -> what broadcasts to (B, G, R T, S), no larger than it must be.

    Example:
      >>> padding, causal = jnp.zeros((2, 1, 1, 5)), jnp.zeros((1, 1, 4, 5))
      >>> _in_rows(padding, (2, 6, 4, 8), 3).shape, _in_rows(causal, (2, 6, 4, 8), 3).shape
      ((2, 1, 1, 5), (1, 1, 8, 5))
    """
    (_, H, T, _), (b, h, t, S) = shape, bias.shape
    R = H // G
    r = R if h > 1 or t > 1 else 1
    g, t_full = G if h > 1 else 1, T if r > 1 else t
    heads = bias.reshape(b, G, R, t, S) if h > 1 else bias[:, :, None]
    return jnp.broadcast_to(heads, (b, g, r, t_full, S)).reshape(b, g, r * t_full, S)


def _added(mask: Array | None, bias: Array | None, dtype: Any) -> Array | None:
    """Mask and bias as one addend of the scores: XLA on a CPU fuses a sum into its softmax, and no selection."""
    if mask is None:
        return None if bias is None else bias.astype(dtype)
    hidden = jnp.where(mask, jnp.zeros((), dtype), jnp.finfo(dtype).min)
    return hidden if bias is None else bias.astype(dtype) + hidden


def _n_blocks(n_queries: int, n_keys: int, dropout_fn: Any, is_causal: bool) -> int:
    """How many blocks of queries: more than one where a CPU can leave out the keys that all of a block do not see."""
    can_skip = is_causal and n_queries == n_keys and dropout_fn is None and jax.default_backend() == "cpu"
    return BLOCKS if can_skip and n_queries % BLOCKS == 0 and n_queries >= LEAST_BLOCK * BLOCKS else 1
