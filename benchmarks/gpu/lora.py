"""A Llama-like model of 1.5 billion parameters: one step of full fine-tuning, and of LoRA on a bfloat16 base."""

from typing import Any

import numpy as np

from benchmarks.gpu.sides import N_BATCHES, Parts
from benchmarks.gpu.sides import Jaxdl as JaxdlSide


class Jaxdl(JaxdlSide):
    """A case of `benchmarks.h100_memory`. Nobody compares its losses: its weights are sines, made on the device, since
    to draw them would compile for longer, and hold more at once, than the step.
    """

    def make(self, case: str, dtype: str, **sizes: int) -> Parts:
        from benchmarks import h100_memory as h

        chosen, dims = {"full": h.CASES[0], "lora": h.CASES[2]}[case], h.Sizes(**sizes)
        loss_fn, init, batch = h.parts(chosen, dims, dtype)
        rng = np.random.default_rng(1)
        shape = (N_BATCHES, *batch["tokens"].shape)
        batches = {name: rng.integers(0, dims.vocab_size, shape, dtype=np.int32) for name in batch}
        return Parts(loss_fn, lambda key: (_sines(init, key), {}), batches, None, chosen.trainable)


def _sines(init: Any, key: Any) -> Any:
    """As `init(key)`, but for the values: norms are near 1, all else is as small as usual."""
    import jax
    import jax.numpy as jnp

    def fill(path: Any, leaf: Any) -> Any:
        wave = 0.02 * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)
        return (wave + jax.tree_util.keystr(path).endswith("scale']")).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(init, key))
