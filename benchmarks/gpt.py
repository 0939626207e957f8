"""A GPT on random tokens: one training step.

Dimensions: `B` batch, `T` time, `N` batches.
"""

from typing import Any

import numpy as np

from benchmarks.harness import Settings, measure
from benchmarks.table import Table
from benchmarks.training import N_BATCHES, Aim, JaxdlParts, competitors, table, to_torch
from benchmarks.training import Jaxdl as JaxdlTraining
from benchmarks.training import Torch as TorchTraining
from benchmarks.weights import fill_module, fill_tree

SIZES = {"width": 384, "n_heads": 6, "n_layers": 6, "vocab_size": 5000, "length": 256, "batch_size": 16}
AIM = Aim(0.88, 1.05)
STEPS = 1


def make_batches(vocab_size: int, length: int, batch_size: int) -> dict[str, np.ndarray]:
    """`tokens` and `targets`, the next tokens: (N, B, T) int32."""
    rng = np.random.default_rng(1)
    text = rng.integers(0, vocab_size, (N_BATCHES, batch_size, length + 1), dtype=np.int32)
    return {"tokens": np.ascontiguousarray(text[..., :-1]), "targets": np.ascontiguousarray(text[..., 1:])}


class Jaxdl(JaxdlTraining):
    """`jaxdl.models.gpt2.GPT2` under the language-model loss."""

    def make(
        self, width: int, n_heads: int, n_layers: int, vocab_size: int, length: int, batch_size: int
    ) -> JaxdlParts:
        import jax

        from jaxdl.models.gpt2 import GPT2, gpt2_block
        from jaxdl.models.language import make_language_loss_fn

        block = gpt2_block(width=width, n_heads=n_heads)
        model = GPT2(block, n_layers=n_layers, vocab_size=vocab_size, n_positions=length)
        batches = make_batches(vocab_size, length, batch_size)
        shapes = jax.eval_shape(model.init, jax.random.key(0), batches["tokens"][0])
        return JaxdlParts(make_language_loss_fn(model, train=True), fill_tree(shapes["params"]), batches)


class Torch(TorchTraining):
    """A compact GPT-2 with PyTorch's fused attention."""

    def make(
        self, width: int, n_heads: int, n_layers: int, vocab_size: int, length: int, batch_size: int
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        from benchmarks.torch_models import GPT

        model = GPT(width, n_heads, n_layers, vocab_size, length).to(self.device)
        fill_module(model)

        def loss_fn(tokens: Any, targets: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

        return model, loss_fn, to_torch(make_batches(vocab_size, length, batch_size))


def flops_per_step(width: int, n_heads: int, n_layers: int, vocab_size: int, length: int, batch_size: int) -> int:
    """Operations of the products of one update, attention without making use of the causal mask.

    Example:
      >>> flops_per_step(1, 1, 1, 10, 1, 1)  # 6 for each: 12 weights, 2 of attention, 10 logits
      144
    """
    weights = n_layers * 12 * width**2 + vocab_size * width
    return 6 * batch_size * length * (weights + n_layers * 2 * length * width)


def run(settings: Settings) -> list[Table]:
    """One table."""
    results = measure(competitors("benchmarks.gpt", SIZES, settings, steps=STEPS, is_mapped=True, bare="gpt"), settings)
    title = (
        "GPT {n_layers} layers x {width}, length {length}, batch {batch_size}, vocabulary {vocab_size}: one "
        "training step".format(**SIZES)
    )
    return [table(title, results, flops=flops_per_step(**SIZES), aim=AIM)]
