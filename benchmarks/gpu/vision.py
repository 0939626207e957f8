"""ViT-S/16 and ResNet-50 on random images: one training step."""

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.published import resnet50, vit
from benchmarks.gpu.sides import Jaxdl, Parts, Torch, draw_images, to_torch
from benchmarks.weights import draw, fill_module


def _parts(model: Any, batches: Any) -> Parts:
    from jaxdl.models.apply import init_model, make_loss_fn
    from jaxdl.objectives import classification

    one = batches["image"][0, :1]
    loss_fn = make_loss_fn(model, classification(), inputs="image", train=True)
    return Parts(loss_fn, lambda key: init_model(model, key, one), batches)


class JaxdlViT(Jaxdl):
    """`jaxdl.models.vit.ViT` with a class token."""

    def make(
        self,
        width: int,
        n_heads: int,
        n_layers: int,
        image_size: int,
        patch_size: int,
        n_classes: int,
        batch_size: int,
        dtype: str,
    ) -> Parts:
        from jaxdl.models.vit import ViT, vit_block

        block = vit_block(width, n_heads, 4 * width, dtype=dtype)
        own: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "n_outputs": n_classes}
        model = ViT(block, n_layers=n_layers, head="classify", **own)
        return _parts(model, draw_images(image_size, n_classes, batch_size))


class TorchViT(Torch):
    """timm's network where it is installed, else the same in short; queries, keys and values are one product."""

    def make(
        self,
        width: int,
        n_heads: int,
        n_layers: int,
        image_size: int,
        patch_size: int,
        n_classes: int,
        batch_size: int,
        dtype: str,
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        from benchmarks.gpu.torch_models import ViT

        model = ViT(width, n_heads, n_layers, image_size, patch_size, n_classes)
        fill_module(model)
        model.add_class_token(torch.from_numpy(draw("embed/class_token", (width,))))
        model, rows = model.fuse(), to_torch(draw_images(image_size, n_classes, batch_size))
        if published := vit(model, image_size, n_heads):
            model, rows = published, _channels_first(rows)
            self.network = "timm's VisionTransformer"
        return _sides(model.to(self.device), rows)


def _channels_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """NCHW to the eye; in memory the channels stay last."""
    return [{**row, "image": row["image"].permute(0, 3, 1, 2)} for row in rows]


def _sides(model: Any, batches: list[dict[str, Any]]) -> tuple[Any, Any, list[dict[str, Any]]]:
    import torch

    def loss_fn(image: Any, label: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(image), label)

    return model, loss_fn, batches


class JaxdlResNet(Jaxdl):
    """`jaxdl.models.ResNet` of bottleneck blocks with batch norms."""

    def make(
        self, stage_sizes: Sequence[int], width: int, image_size: int, n_classes: int, batch_size: int, dtype: str
    ) -> Parts:
        from jaxdl.models.resnet import BottleneckBlock, ResNet

        own: dict[str, Any] = {"norm": "batch", "block": BottleneckBlock, "dtype": dtype}
        model = ResNet(n_classes, stage_sizes=tuple(stage_sizes), width=width, **own)
        return _parts(model, draw_images(image_size, n_classes, batch_size))


class TorchResNet(Torch):
    """torchvision's network where it is installed, else the same in short; channels last."""

    def make(
        self, stage_sizes: Sequence[int], width: int, image_size: int, n_classes: int, batch_size: int, dtype: str
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        from benchmarks.gpu.torch_models import ResNet

        model: Any = ResNet(stage_sizes, width, n_classes)
        fill_module(model)
        rows = _channels_first(to_torch(draw_images(image_size, n_classes, batch_size)))
        if tuple(stage_sizes) == (3, 4, 6, 3) and width == 64 and (published := resnet50(model)):
            model, self.network = published, "torchvision's resnet50"
        return _sides(model.to(self.device, memory_format=torch.channels_last), rows)
