"""Floating-point operations of a traced function: products and convolutions, loops times their length.

XLA's own count takes the body of a loop once, so that it is wrong by about the number of layers where they are scanned.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

Flops = Counter[str]


def count_flops(fn: Callable[..., Any], *args: Any) -> Flops:
    """Multiplications and additions of all matrix products and convolutions, by the dtype of their operands.

    A loop counts as often as it runs, a branch as its dearest side, a `while` without a known length once. The sizes
    are those of the whole arrays: of all devices together.

    Args:
      fn: any traceable function.
      args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      dtype -> operations.

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 3), "float32")
      >>> def fn(x):
      ...     return jax.lax.scan(lambda carry, _: (carry @ carry.T @ carry, None), x, length=5)
      >>> count_flops(fn, x) == {"float32": 5 * (2 * 2 * 2 * 3 + 2 * 2 * 2 * 3)}
      True
    """
    return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


@contextlib.contextmanager
def without_remat() -> Iterator[None]:
    """`jax.checkpoint` computes nothing twice: what the model needs, not what saving memory costs."""

    def plain(fn: Any = None, **_: Any) -> Any:
        return (lambda fn: fn) if fn is None else fn

    with mock.patch.object(jax, "checkpoint", plain), mock.patch.object(jax, "remat", plain):
        yield


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Lets the library choose as it would on another platform: `cpu`, `gpu` or `tpu`."""
    jax.clear_caches()
    with mock.patch.object(jax, "default_backend", return_value=platform):
        yield


def of_jaxpr(jaxpr: Any) -> Flops:
    """The same of what is traced already.

    Example:
      >>> of_jaxpr(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))).jaxpr).total()
      16
    """
    total: Flops = Counter()
    for eqn in jaxpr.eqns:
        total.update(_of_equation(eqn))
    return total


def _of_equation(eqn: Any) -> Flops:
    name = eqn.primitive.name
    if name in _COUNTED:
        dtype = jnp.promote_types(*(one.aval.dtype for one in eqn.invars[:2]))
        return Counter({str(dtype): _COUNTED[name](eqn)})
    if name == "cond":
        return max((of_jaxpr(branch.jaxpr) for branch in eqn.params["branches"]), key=Counter.total)
    times = 1
    if name == "scan":
        times = eqn.params["length"]
    elif name == "shard_map":
        times = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    total: Flops = Counter()
    for inner in _inner(eqn.params):
        total.update(of_jaxpr(inner))
    return Counter({dtype: times * n for dtype, n in total.items()})


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, (out,) = eqn.invars[0].aval, eqn.outvars
    return 2 * math.prod(out.aval.shape) * math.prod(lhs.shape[i] for i in contracted)


def _convolution(eqn: Any) -> int:
    """Zeros that a dilated input is filled with, as in the gradient of a strided convolution, do not count."""
    kernel, (out,) = eqn.invars[1].aval, eqn.outvars
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    filled = math.prod(eqn.params["lhs_dilation"])
    return 2 * math.prod(out.aval.shape) * math.prod(kernel.shape) // outputs // filled


def _attention(n_products: int) -> Callable[[Any], int]:
    """cuDNN's attention, (B, T, H, K) by (B, S, G, K): each product as if nothing were masked."""

    def count(eqn: Any) -> int:
        B, T, H, K = eqn.invars[0].aval.shape
        S = eqn.invars[1].aval.shape[1]
        return n_products * 2 * B * H * T * S * K

    return count


_COUNTED: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _attention(2),
    "dot_product_attention_bwd_wrapper": _attention(5),
}
