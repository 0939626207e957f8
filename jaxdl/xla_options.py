"""Options that XLA compiles a step with, by device. They are said in the log, and `XLA_FLAGS` come first."""

import os
from typing import Any

import jax

from jaxdl.choices import tell

# Products that Triton may make leave the adding of biases and of gradients to passes of their own, even those that XLA
# then gives to cuBLAS, which are nearly all. So do the products of query and key where XLA merges them, whose gradients
# it also copies into one array first; small products may be merged.
_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 8},
}


def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit(step, donate_argnums=0, compiler_options=...)` on the default device.

    On a GPU products are cuBLAS's, which adds biases and sums of gradients as it multiplies; on other devices there are
    none. An option that `XLA_FLAGS` names is left to it. What the library compiles by itself has these options already.

    Example:
      >>> import jax.numpy as jnp
      >>> step = jax.jit(lambda state, batch: (state + batch.sum(), {}), compiler_options=compiler_options())
      >>> float(step(jnp.zeros(()), jnp.ones(3))[0])
      3.0
    """
    given = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in _OPTIONS.get(jax.default_backend(), {}).items() if name not in given}
    if options:
        told = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
        tell("compiler options", told, "products with their biases are cuBLAS's; XLA_FLAGS comes first")
    return options
