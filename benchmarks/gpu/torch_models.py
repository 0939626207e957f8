"""Compact PyTorch networks as a user would write them for speed, named as jaxdl's paths until they are filled."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    """Multi-head attention by PyTorch's fused kernel; `fuse` makes queries, keys and values one product."""

    def __init__(self, width: int, n_heads: int, is_causal: bool) -> None:
        super().__init__()
        self.n_heads, self.is_causal = n_heads, is_causal
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def fuse(self) -> None:
        """To be called once the weights are in."""
        parts = [self.query, self.key, self.value]
        width = self.output.in_features
        self.qkv = nn.Linear(width, 3 * width)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            self.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        del self.query, self.key, self.value

    def forward(self, x_BTD: Any) -> Any:
        B, T, D = x_BTD.shape
        query, key, value = (
            part.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2) for part in self.qkv(x_BTD).split(D, 2)
        )
        y_BHTK = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        return self.output(y_BHTK.transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    """Norm and attention, norm and feed-forward, each a residual branch."""

    def __init__(self, width: int, n_heads: int, hidden: int, *, is_causal: bool, gelu: str, epsilon: float) -> None:
        super().__init__()
        self.gelu = gelu
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=epsilon), nn.LayerNorm(width, eps=epsilon)
        self.attention = Attention(width, n_heads, is_causal)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)})

    def forward(self, x_BTD: Any) -> Any:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp["down"](F.gelu(self.mlp["up"](self.mlp_norm(x_BTD)), approximate=self.gelu))


class _Network(nn.Module):
    def fuse(self) -> Any:
        """Makes every attention's three products one; returns the network."""
        for module in list(self.modules()):
            if isinstance(module, Attention):
                module.fuse()
        return self


class GPT(_Network):
    """GPT-2 with tied logits."""

    def __init__(self, width: int, n_heads: int, n_layers: int, vocab_size: int, n_positions: int) -> None:
        super().__init__()
        tables = {"token": nn.Embedding(vocab_size, width), "position": nn.Embedding(n_positions, width)}
        self.embed: Any = nn.ModuleDict(tables)
        own: dict[str, Any] = {"is_causal": True, "gelu": "tanh", "epsilon": 1e-5}
        layers: dict[str, nn.Module] = {f"layer_{i}": Layer(width, n_heads, 4 * width, **own) for i in range(n_layers)}
        self.decoder = nn.ModuleDict({**layers, "final_norm": nn.LayerNorm(width)})

    def forward(self, tokens_BT: Any) -> Any:
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embed["token"](tokens_BT) + self.embed["position"](positions)
        for layer in self.decoder.values():
            x_BTD = layer(x_BTD)
        return F.linear(x_BTD, self.embed["token"].weight)


class ViT(_Network):
    """A vision transformer on NHWC images, its patches a linear layer, a class token first."""

    def __init__(
        self, width: int, n_heads: int, n_layers: int, image_size: int, patch_size: int, n_classes: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        n_tokens = (image_size // patch_size) ** 2 + 1
        self.embed: Any = nn.ModuleDict(
            {"patch": nn.Linear(3 * patch_size**2, width), "position": nn.Embedding(n_tokens, width)}
        )
        own: dict[str, Any] = {"is_causal": False, "gelu": "none", "epsilon": 1e-12}
        layers: dict[str, nn.Module] = {f"layer_{i}": Layer(width, n_heads, 4 * width, **own) for i in range(n_layers)}
        self.encoder = nn.ModuleDict({**layers, "final_norm": nn.LayerNorm(width, eps=1e-12)})
        self.head = nn.Linear(width, n_classes)

    def add_class_token(self, token_D: Any) -> None:
        """Its value; to be called once the other weights are in."""
        self.class_token = nn.Parameter(token_D)

    def forward(self, image_BHWC: Any) -> Any:
        B, H, W, C = image_BHWC.shape
        P = self.patch_size
        patches = image_BHWC.view(B, H // P, P, W // P, P, C).transpose(2, 3).reshape(B, -1, P * P * C)
        x_BND = self.embed["patch"](patches)
        x_BND = torch.cat([self.class_token.to(x_BND.dtype).expand(B, 1, -1), x_BND], 1)
        x_BND = x_BND + self.embed["position"].weight
        for layer in self.encoder.values():
            x_BND = layer(x_BND)
        return self.head(x_BND[:, 0])


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks, version 1.5, with batch norms: torchvision's ResNet-50 for sizes (3, 4, 6, 3)."""

    def __init__(self, stage_sizes: Any, width: int, n_classes: int) -> None:
        super().__init__()
        self.stem_conv = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.stages: list[Any] = []
        n_in = width
        for i, n_blocks in enumerate(stage_sizes):
            blocks: dict[str, nn.Module] = {}
            for j in range(n_blocks):
                blocks[f"block_{j}"] = Bottleneck(n_in, width * 2**i, 2 if i and not j else 1)
                n_in = 4 * width * 2**i
            self.stages.append(nn.ModuleDict(blocks))
            self.add_module(f"stage_{i}", self.stages[-1])
        self.head = nn.Linear(n_in, n_classes)

    def forward(self, x_BCHW: Any) -> Any:
        x_BCHW = F.max_pool2d(F.relu(self.stem_norm(self.stem_conv(x_BCHW))), 3, 2, 1)
        for blocks in self.stages:
            for block in blocks.values():
                x_BCHW = block(x_BCHW)
        return self.head(x_BCHW.mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolution to four times the features."""

    def __init__(self, n_in: int, n: int, strides: int) -> None:
        super().__init__()
        self.conv_0, self.norm_0 = nn.Conv2d(n_in, n, 1, bias=False), nn.BatchNorm2d(n)
        self.conv_1, self.norm_1 = nn.Conv2d(n, n, 3, strides, padding=1, bias=False), nn.BatchNorm2d(n)
        self.conv_2, self.norm_2 = nn.Conv2d(n, 4 * n, 1, bias=False), nn.BatchNorm2d(4 * n)
        self.is_resized = strides != 1 or n_in != 4 * n
        if self.is_resized:
            self.shortcut_conv = nn.Conv2d(n_in, 4 * n, 1, strides, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(4 * n)

    def forward(self, x: Any) -> Any:
        y = F.relu(self.norm_0(self.conv_0(x)))
        y = self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(y)))))
        return F.relu((self.shortcut_norm(self.shortcut_conv(x)) if self.is_resized else x) + y)
