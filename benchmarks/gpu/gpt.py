"""GPT-2 124M: one training step.

Dimensions: `B` batch, `T` time, `N` batches.
"""

from typing import Any

import numpy as np

from benchmarks.gpu.sides import N_BATCHES, Parts, to_torch
from benchmarks.gpu.sides import Jaxdl as JaxdlSide
from benchmarks.gpu.sides import Torch as TorchSide
from benchmarks.weights import fill_module


def make_batches(vocab_size: int, length: int, batch_size: int) -> dict[str, np.ndarray]:
    """`tokens` and `targets`, the next tokens: (N, B, T) int32."""
    rng = np.random.default_rng(1)
    text = rng.integers(0, vocab_size, (N_BATCHES, batch_size, length + 1), dtype=np.int32)
    return {"tokens": np.ascontiguousarray(text[..., :-1]), "targets": np.ascontiguousarray(text[..., 1:])}


class Jaxdl(JaxdlSide):
    """`jaxdl.models.gpt2.GPT2` under the language-model loss."""

    def make(
        self,
        width: int,
        n_heads: int,
        n_layers: int,
        vocab_size: int,
        length: int,
        batch_size: int,
        dtype: str,
        chunk_tokens: int | None = None,
    ) -> Parts:
        from jaxdl.models.apply import init_model
        from jaxdl.models.gpt2 import GPT2, gpt2_block
        from jaxdl.models.language import make_language_loss_fn

        block = gpt2_block(width=width, n_heads=n_heads, dtype=dtype)
        model = GPT2(block, n_layers=n_layers, vocab_size=vocab_size, n_positions=length)
        batches = make_batches(vocab_size, length, batch_size)
        one = batches["tokens"][0, :1]
        loss_fn = make_language_loss_fn(model, train=True, chunk_tokens=chunk_tokens)
        return Parts(loss_fn, lambda key: init_model(model, key, one), batches)


class Torch(TorchSide):
    """A compact GPT-2 with PyTorch's fused attention; queries, keys and values are one product."""

    def make(
        self, width: int, n_heads: int, n_layers: int, vocab_size: int, length: int, batch_size: int, dtype: str
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        from benchmarks.gpu.torch_models import GPT

        model = GPT(width, n_heads, n_layers, vocab_size, length)
        fill_module(model)
        model = model.fuse().to(self.device)

        def loss_fn(tokens: Any, targets: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

        return model, loss_fn, to_torch(make_batches(vocab_size, length, batch_size))
