"""Options that XLA compiles a step with, by device. They are said in the log, and `XLA_FLAGS` come first."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from jaxdl.choices import tell

# Products that Triton may make leave the adding of biases and of gradients to passes of their own, even those that XLA
# then gives to cuBLAS, which are nearly all. So do the products of query and key where XLA merges them, whose gradients
# it also copies into one array first; small products may be merged.
_CUBLAS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 8}
# In the order of XLA operations run beside each other, which convolutions gain by: one alone does not keep all cores
# busy. All else gains more by finding in the cache what was computed last, and by the pages that it does not need.
_LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compiler_options(fn: Callable[..., Any] | None = None, *args: Any) -> dict[str, Any]:
    """Options for `jax.jit(fn, donate_argnums=0, compiler_options=...)` on the default device.

    On a GPU products are cuBLAS's, which adds biases and sums of gradients as it multiplies. On a CPU operations come
    in the order that needs least memory, unless there are convolutions among them. What `XLA_FLAGS` names is left to
    it, and what this version of XLA does not know is left out. What `fit` compiles has these options already. JAX
    refuses options of a function that is jitted inside another.

    Args:
      fn: what will be compiled, such as a train step; it is traced. None gives what suits every function.
      args: what it will be called with, arrays or `jax.ShapeDtypeStruct`s.

    Example:
      >>> import jax.numpy as jnp
      >>> step = lambda state, batch: (state + batch.sum(), {})
      >>> options = compiler_options(step, jnp.zeros(()), jnp.ones(3))
      >>> float(jax.jit(step, donate_argnums=0, compiler_options=options)(jnp.zeros(()), jnp.ones(3))[0])
      3.0
    """
    return options_of(None if fn is None else jax.jit(fn).trace(*args).jaxpr.jaxpr)


def options_of(jaxpr: Any) -> dict[str, Any]:
    """The same of what is traced already; None stands for any function."""
    options: dict[str, Any] = {}
    if jax.default_backend() == "gpu":
        options = _chosen(_CUBLAS, "products with their biases are cuBLAS's")
    elif jax.default_backend() == "cpu" and jaxpr is not None and not _has_convolution(jaxpr):
        options = _chosen(_LEAST_MEMORY, "no convolutions")
    return options


def _chosen(wanted: dict[str, Any], reason: str) -> dict[str, Any]:
    given = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in wanted.items() if name not in given and _is_known(name, value)}
    if options:
        told = " ".join(
            f"--{name}={str(value).lower() if value is False else value}" for name, value in options.items()
        )
        tell("compiler options", told, f"{reason}; XLA_FLAGS comes first")
    return options


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    from jaxdl.compilation import unkept  # which imports this module

    try:
        with unkept():
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _has_convolution(jaxpr: Any) -> bool:
    return any(eqn.primitive.name == "conv_general_dilated" for eqn in _equations(jaxpr))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)
