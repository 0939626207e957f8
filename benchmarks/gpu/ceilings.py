"""What a device reaches at the most: a large product in bfloat16, and a large copy."""

import statistics
import time
from collections.abc import Callable
from typing import Any


class Ceilings:
    """Measures both once; `facts` has `kind`, `product_flops` and `copy_bytes`, each a second."""

    def __init__(self, size: int = 8192, n_bytes: int = 4 * 2**30) -> None:
        import jax
        import jax.numpy as jnp

        device = jax.devices()[0]
        a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
        x = jax.random.normal(jax.random.key(1), (n_bytes // 4,), jnp.float32)
        product_s = _median(jax.jit(jnp.matmul), a, b)
        copy_s = _median(jax.jit(lambda x: x + 1), x)
        self.facts = {
            "kind": device.device_kind,
            "product_flops": 2 * size**3 / product_s,
            "copy_bytes": 2 * n_bytes / copy_s,
        }

    def round(self) -> float:
        """Nothing to do in turn."""
        return 0.0


def _median(fn: Callable[..., Any], *args: Any, n: int = 10) -> float:
    taken = []
    for _ in range(n + 3):
        start = time.perf_counter()
        fn(*args).block_until_ready()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[3:])
