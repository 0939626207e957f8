"""Recurrent layers over random sequences, the mean of their outputs over time, and a linear layer: one training step.

Dimensions: `B` batch, `T` time, `D` inputs, `F` width of a state, `N` batches.
"""

from typing import Any

import numpy as np

from benchmarks.harness import Settings, measure
from benchmarks.table import Table
from benchmarks.training import N_BATCHES, Aim, JaxdlParts, competitors, table, to_torch
from benchmarks.training import Jaxdl as JaxdlTraining
from benchmarks.training import Torch as TorchTraining
from benchmarks.weights import fill_module, fill_tree

SIZES: dict[str, Any] = {"width": 256, "n_layers": 2, "length": 128, "batch_size": 32}
N_OUTPUTS = 10
# name -> (options of both sides, floor and aim, steps of a round)
WORKLOADS = {
    "LSTM": ({"cell": "lstm", "bidirectional": False}, Aim(0.7, 1.0), 3),
    "GRU": ({"cell": "gru", "bidirectional": False}, Aim(1.0, 1.2), 3),
    "Bidirectional LSTM": ({"cell": "lstm", "bidirectional": True}, Aim(0.7, 1.0), 2),
}


def make_batches(width: int, length: int, batch_size: int) -> dict[str, np.ndarray]:
    """`x` (N, B, T, D = F) float32 and `label` (N, B) int32."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((N_BATCHES, batch_size, length, width), np.float32)
    return {"x": x, "label": rng.integers(0, N_OUTPUTS, (N_BATCHES, batch_size), dtype=np.int32)}


class Jaxdl(JaxdlTraining):
    """`jaxdl.models.Recurrent`."""

    def make(
        self, cell: str, bidirectional: bool, width: int, n_layers: int, length: int, batch_size: int
    ) -> JaxdlParts:
        import flax.linen as nn
        import jax

        from jaxdl.models.apply import make_loss_fn
        from jaxdl.models.recurrent import Recurrent
        from jaxdl.objectives import classification

        class Reader(nn.Module):
            @nn.compact
            def __call__(self, x_BTD: Any, *, train: bool = False) -> Any:
                layers = Recurrent(width, cell, n_layers, bidirectional, name="recurrent")
                outputs_BTF, _ = layers(x_BTD, train=train)
                return nn.Dense(N_OUTPUTS, name="head")(outputs_BTF.mean(1))

        model, batches = Reader(), make_batches(width, length, batch_size)
        shapes = jax.eval_shape(model.init, jax.random.key(0), batches["x"][0])
        loss_fn = make_loss_fn(model, classification(), inputs="x", train=True)
        return JaxdlParts(loss_fn, fill_tree(shapes["params"]), batches)


class Torch(TorchTraining):
    """`torch.nn.LSTM` or `torch.nn.GRU`."""

    def make(
        self, cell: str, bidirectional: bool, width: int, n_layers: int, length: int, batch_size: int
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        from benchmarks.torch_models import Reader

        model = Reader(cell, width, width, n_layers, N_OUTPUTS, bidirectional).to(self.device)
        fill_module(model)

        def loss_fn(x: Any, label: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(x), label)

        return model, loss_fn, to_torch(make_batches(width, length, batch_size))


def flops_per_step(cell: str, bidirectional: bool, width: int, n_layers: int, length: int, batch_size: int) -> int:
    """Operations of the products of one update; the gradient of the first layer's inputs is not needed.

    Example:
      >>> flops_per_step("lstm", False, 1, 1, 1, 1)  # forward 2 * (4 + 4), weights as much, states 2 * 4; the head 60
      40
    """
    n_gates, n_directions = {"lstm": 4, "gru": 3}[cell], 2 if bidirectional else 1
    inputs = [width] + [width * n_directions] * (n_layers - 1)
    columns, rows = n_gates * width * n_directions, batch_size * length
    products = [2 * rows * n * columns for n in inputs]
    return 3 * sum(products) - products[0] + 3 * n_layers * 2 * rows * width * columns


def run(settings: Settings) -> list[Table]:
    """A table for each kind of layer."""
    tables = []
    for name, (options, aim, steps) in WORKLOADS.items():
        sizes: dict[str, Any] = {**options, **SIZES}
        bare = "lstm" if name == "LSTM" else None
        rows = competitors(
            "benchmarks.recurrent", sizes, settings, steps=steps, is_mapped=True, bare=bare, keras="recurrent"
        )
        results = measure(rows, settings)
        title = "{} {n_layers} x {width}, length {length}, batch {batch_size}: one training step".format(name, **SIZES)
        tables.append(table(title, results, flops=flops_per_step(**sizes), aim=aim))
    return tables
