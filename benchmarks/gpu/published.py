"""The networks of torchvision and timm with the weights of `torch_models`, so that losses can be compared."""

import importlib.util
import re
from typing import Any


def resnet50(compact: Any) -> Any:
    """`torchvision.models.resnet50` with the weights of a `ResNet` of its size, or None where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    import torchvision

    theirs = torchvision.models.resnet50(num_classes=compact.head.out_features)
    theirs.load_state_dict({resnet_name(name): value for name, value in compact.state_dict().items()})
    return theirs


def resnet_name(name: str) -> str:
    """Our name of a tensor -> torchvision's.

    Example:
      >>> [resnet_name(f"stage_0.block_2.{part}") for part in ("conv_1.weight", "norm_1.bias")]
      ['layer1.2.conv2.weight', 'layer1.2.bn2.bias']
      >>> resnet_name("stage_3.block_0.shortcut_norm.running_var"), resnet_name("stem_conv.weight")
      ('layer4.0.downsample.1.running_var', 'conv1.weight')
    """
    fixed = {"stem_conv": "conv1", "stem_norm": "bn1", "head": "fc"}
    first, _, rest = name.partition(".")
    if first in fixed:
        return f"{fixed[first]}.{rest}"
    stage, block, part, leaf = re.fullmatch(r"stage_(\d)\.block_(\d+)\.(\w+)\.(\w+)", name).groups()  # type: ignore[union-attr]
    inner = {"shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1"}
    inner |= {
        f"{ours}_{i}": f"{theirs}{i + 1}" for i in range(3) for ours, theirs in (("conv", "conv"), ("norm", "bn"))
    }
    return f"layer{int(stage) + 1}.{block}.{inner[part]}.{leaf}"


def vit(compact: Any, image_size: int, n_heads: int) -> Any:
    """timm's `VisionTransformer` with the weights of a fused `ViT`, or None where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        return None
    from timm.models.vision_transformer import VisionTransformer

    width = compact.head.in_features
    theirs = VisionTransformer(
        img_size=image_size,
        patch_size=compact.patch_size,
        num_classes=compact.head.out_features,
        embed_dim=width,
        depth=len(compact.encoder) - 1,
        num_heads=n_heads,
    )
    state = compact.state_dict()
    side = compact.patch_size
    ours = {
        "cls_token": state["class_token"].view(1, 1, width),
        "pos_embed": state["embed.position.weight"][None],
        "patch_embed.proj.weight": state["embed.patch.weight"].view(width, side, side, 3).permute(0, 3, 1, 2),
        "patch_embed.proj.bias": state["embed.patch.bias"],
    }
    ours |= {vit_name(k): v for k, v in state.items() if not k.startswith(("class_token", "embed."))}
    theirs.load_state_dict(ours)
    return theirs


def vit_name(name: str) -> str:
    """Our name of a tensor of a layer, the last norm or the head -> timm's.

    Example:
      >>> vit_name("encoder.layer_3.attention.qkv.bias"), vit_name("encoder.layer_0.mlp_norm.weight")
      ('blocks.3.attn.qkv.bias', 'blocks.0.norm2.weight')
      >>> vit_name("encoder.final_norm.weight"), vit_name("head.bias")
      ('norm.weight', 'head.bias')
    """
    parts = {"attention_norm": "norm1", "attention.qkv": "attn.qkv", "attention.output": "attn.proj"}
    parts |= {"mlp_norm": "norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    name = name.removeprefix("encoder.").replace("final_norm.", "norm.")
    found = re.fullmatch(r"layer_(\d+)\.([\w.]+)\.(\w+)", name)
    return f"blocks.{found[1]}.{parts[found[2]]}.{found[3]}" if found else name
