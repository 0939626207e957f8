"""A Llama-like model of 1.5 billion parameters: one step of full fine-tuning, and of LoRA on a bfloat16 base."""

import numpy as np

from benchmarks.gpu.sides import N_BATCHES, Parts
from benchmarks.gpu.sides import Jaxdl as JaxdlSide


class Jaxdl(JaxdlSide):
    """A case of `benchmarks.h100_memory`; its weights are drawn on the device, and nobody compares its losses."""

    def make(self, case: str, dtype: str, **sizes: int) -> Parts:
        from benchmarks import h100_memory as h

        chosen, dims = {"full": h.CASES[0], "lora": h.CASES[2]}[case], h.Sizes(**sizes)
        loss_fn, init, batch = h.parts(chosen, dims, dtype)
        rng = np.random.default_rng(1)
        shape = (N_BATCHES, *batch["tokens"].shape)
        batches = {name: rng.integers(0, dims.vocab_size, shape, dtype=np.int32) for name in batch}
        return Parts(loss_fn, lambda key: (init(key), {}), batches, None, chosen.trainable)
