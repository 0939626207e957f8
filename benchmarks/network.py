"""The MLP that several benchmarks train: its numbers, and the same step in both libraries."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

SIZES = (784, 512, 512, 10)
BATCH_SIZE = 128
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2  # decay of every leaf, as torch.optim.AdamW has it


def initial_weights(sizes: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kernel (inputs, outputs), bias (outputs,)) of each layer, float32, the same in every process."""
    rng = np.random.default_rng(0)
    scales = [np.sqrt(2 / n_in) for n_in in sizes[:-1]]
    shapes = itertools.pairwise(sizes)
    kernels = [rng.standard_normal(shape, np.float32) * np.float32(s) for shape, s in zip(shapes, scales, strict=True)]
    return [(kernel, np.zeros(kernel.shape[1], np.float32)) for kernel in kernels]


def training_rows(sizes: Sequence[int], n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Random features (n_rows, sizes[0]) float32 and labels (n_rows,) int32, the same in every process."""
    rng = np.random.default_rng(1)
    features = rng.standard_normal((n_rows, sizes[0]), np.float32)
    return features, rng.integers(0, sizes[-1], n_rows, dtype=np.int32)


def flops_per_step(sizes: Sequence[int], batch_size: int) -> int:
    """Operations of the matrix products of one update: forward, weight gradients, input gradients but the first.

    Example:
      >>> flops_per_step((3, 2), 1)  # 2 * 6 forward and 2 * 6 for the weights
      24
    """
    products = [n_in * n_out for n_in, n_out in itertools.pairwise(sizes)]
    return 2 * batch_size * (3 * sum(products) - products[0])


def make_network(sizes: Sequence[int]) -> tuple[Any, Any]:
    """(loss_fn, params) of jaxdl's MLP."""
    import jax

    from jaxdl.models import MLP
    from jaxdl.models.apply import make_loss_fn
    from jaxdl.objectives import classification

    model = MLP(widths=tuple(sizes[1:-1]), n_outputs=sizes[-1])
    names = [*(f"dense_{i}" for i in range(len(sizes) - 2)), "head"]
    params = {
        name: {"kernel": kernel, "bias": bias}
        for name, (kernel, bias) in zip(names, initial_weights(sizes), strict=True)
    }
    loss_fn = make_loss_fn(model, classification(), inputs="features", train=True)
    return loss_fn, jax.tree.map(jax.numpy.asarray, params)


def make_jaxdl(sizes: Sequence[int]) -> tuple[Any, Any]:
    """(train step, first state) by jaxdl's own parts."""
    import jax

    from jaxdl import create_state, make_optimizer, make_train_step

    loss_fn, params = make_network(sizes)
    tx = make_optimizer(
        "adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, weight_decay_rules=[(".*", 1.0)]
    )
    return make_train_step(loss_fn, tx), create_state(params, {}, tx, rng=jax.random.key(0))


def make_torch(sizes: Sequence[int]) -> Any:
    """PyTorch's model: `Linear` and `ReLU`."""
    import torch

    layers: list[Any] = []
    for kernel, bias in initial_weights(sizes):
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])
