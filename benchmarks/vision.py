"""Convolutional networks on random images: one training step.

Dimensions: `B` batch, `H` height, `W` width, `C` channels, `N` batches.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Settings, measure
from benchmarks.table import Table
from benchmarks.training import N_BATCHES, Aim, JaxdlParts, competitors, table, to_torch
from benchmarks.training import Jaxdl as JaxdlTraining
from benchmarks.training import Torch as TorchTraining
from benchmarks.weights import fill_module, fill_tree

N_OUTPUTS = 10
# configs/digits_cnn.py on pictures of 28x28
CNN: dict[str, Any] = {
    "features": (32, 64),
    "dense_width": 128,
    "norm": "group",
    "size": 28,
    "n_channels": 1,
    "batch_size": 128,
}
RESNET: dict[str, Any] = {"width": 64, "norm": "group", "size": 32, "n_channels": 3, "batch_size": 32}
LAST = {"PyTorch eager, channels last": {"channels_last": True}}
LAST_COMPILED = {"PyTorch torch.compile, channels last": {"channels_last": True, "is_compiled": True}}
CNN_STEPS, CNN_STEPS_ON_JAX, RESNET_STEPS = 20, 5, 1  # of a round
RESNET_TOLERANCE = 1e-3
CNN_STEPS_PER_CALL = 5  # of `repeat`


def make_batches(size: int, n_channels: int, batch_size: int) -> dict[str, np.ndarray]:
    """`image` (N, B, H, W, C) float32 and `label` (N, B) int32."""
    rng = np.random.default_rng(1)
    image = rng.standard_normal((N_BATCHES, batch_size, size, size, n_channels), np.float32)
    return {"image": image, "label": rng.integers(0, N_OUTPUTS, (N_BATCHES, batch_size), dtype=np.int32)}


class _Jaxdl(JaxdlTraining):
    def build(self, model: Any, batches: dict[str, np.ndarray]) -> JaxdlParts:
        import jax

        from jaxdl.models.apply import make_loss_fn
        from jaxdl.objectives import classification

        shapes = jax.eval_shape(model.init, jax.random.key(0), batches["image"][0])
        loss_fn = make_loss_fn(model, classification(), inputs="image", train=True)
        return JaxdlParts(loss_fn, fill_tree(shapes["params"]), batches)


class JaxdlCNN(_Jaxdl):
    """`jaxdl.models.CNN`."""

    def make(
        self, features: Sequence[int], dense_width: int, norm: str, size: int, n_channels: int, batch_size: int
    ) -> JaxdlParts:
        from jaxdl.models import CNN

        model = CNN(n_outputs=N_OUTPUTS, features=tuple(features), dense_width=dense_width, norm=norm)
        return self.build(model, make_batches(size, n_channels, batch_size))


class JaxdlResNet(_Jaxdl):
    """`jaxdl.models.ResNet18`."""

    def make(self, width: int, norm: str, size: int, n_channels: int, batch_size: int) -> JaxdlParts:
        from jaxdl.models import ResNet18

        model = ResNet18(n_outputs=N_OUTPUTS, width=width, stem="small", norm=norm)
        return self.build(model, make_batches(size, n_channels, batch_size))


class _Torch(TorchTraining):
    def sides(
        self, model: Any, size: int, n_channels: int, batch_size: int, channels_last: bool
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        layout = torch.channels_last if channels_last else torch.contiguous_format
        fill_module(model)
        model = model.to(self.device, memory_format=layout)
        batches = make_batches(size, n_channels, batch_size)
        batches["image"] = batches["image"].transpose(0, 1, 4, 2, 3)

        def loss_fn(image: Any, label: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(image), label)

        rows = to_torch(batches)
        return model, loss_fn, [{**row, "image": row["image"].contiguous(memory_format=layout)} for row in rows]


class TorchCNN(_Torch):
    """The same CNN, its images in either layout."""

    def make(
        self, features: Sequence[int], dense_width: int, norm: str, channels_last: bool = False, **sizes: Any
    ) -> Any:
        from benchmarks.torch_models import CNN

        model = CNN(sizes["n_channels"], features, dense_width, N_OUTPUTS, norm)
        return self.sides(model, **sizes, channels_last=channels_last)


class TorchResNet(_Torch):
    """The same ResNet-18, its images in either layout."""

    def make(self, width: int, norm: str, channels_last: bool = False, **sizes: Any) -> Any:
        from benchmarks.torch_models import ResNet18

        return self.sides(ResNet18(width, N_OUTPUTS, norm), **sizes, channels_last=channels_last)


def convolution_flops(size: int, kernel: int, n_in: int, n_out: int) -> int:
    """Operations of one convolution of one image, `size` pixels on a side of the output; zeros at the edge count."""
    return 2 * size**2 * kernel**2 * n_in * n_out


def cnn_flops(features: Sequence[int], dense_width: int, norm: str, size: int, n_channels: int, batch_size: int) -> int:
    """Operations of the products of one update; the gradient of the image is not needed.

    Example:
      >>> cnn_flops((1,), 1, "group", 2, 1, 1)  # 72 twice for the first layer, 18 three times, 3 * (2 + 20) dense
      264
    """
    first = convolution_flops(size, 3, n_channels, features[0])
    total, n_in = 0, n_channels
    for n in features:
        total += convolution_flops(size, 3, n_in, n) + convolution_flops(size // 2, 3, n, n)
        size, n_in = size // 2, n
    return batch_size * (3 * (total + 2 * dense_width * (n_in + N_OUTPUTS)) - first)


def resnet_flops(width: int, norm: str, size: int, n_channels: int, batch_size: int) -> int:
    """Operations of the products of one update of a ResNet-18; the gradient of the image is not needed."""
    first = convolution_flops(size, 3, n_channels, width)
    total, n_in = first, width
    for i in range(4):
        n = width * 2**i
        size = size if i == 0 else -(-size // 2)
        total += convolution_flops(size, 3, n_in, n) + 3 * convolution_flops(size, 3, n, n)
        total += 0 if i == 0 else convolution_flops(size, 1, n_in, n)
        n_in = n
    return batch_size * (3 * (total + 2 * n_in * N_OUTPUTS) - first)


def run_cnn(settings: Settings) -> list[Table]:
    """The table of the small CNN."""
    own: Any = {"steps": CNN_STEPS, "bare": "cnn", "keras": "cnn"}
    own |= {"is_mapped": True, "steps_per_call": CNN_STEPS_PER_CALL, "on_jax_steps": CNN_STEPS_ON_JAX}
    last = LAST | LAST_COMPILED
    rows = competitors("benchmarks.vision", CNN, settings, suffix="CNN", torch_variants=last, **own)
    title = "CNN {features}, {size}x{size}x{n_channels}, batch {batch_size}: one training step".format(**CNN)
    return [table(title, measure(rows, settings), flops=cnn_flops(**CNN), aim=Aim(1.0, 1.25))]


def run_resnet(settings: Settings) -> list[Table]:
    """The table of the ResNet-18, whose third loss differs by 1.3e-4 between PyTorch's own two forms."""
    own: Any = {"steps": RESNET_STEPS, "is_mapped": True}
    rows = competitors("benchmarks.vision", RESNET, settings, suffix="ResNet", torch_variants=LAST, **own)
    title = "ResNet-18, {size}x{size}x{n_channels}, batch {batch_size}: one training step".format(**RESNET)
    results = measure(rows, settings)
    return [table(title, results, flops=resnet_flops(**RESNET), aim=Aim(0.65, 1.0), tolerance=RESNET_TOLERANCE)]
