"""Compact PyTorch networks that compute what jaxdl's do. Modules are named as jaxdl's paths: `weights` relies on it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


class Reader(nn.Module):
    """Recurrent layers, the mean of the outputs over time, and a linear layer."""

    def __init__(
        self, cell: str, n_inputs: int, width: int, n_layers: int, n_outputs: int, bidirectional: bool
    ) -> None:
        super().__init__()
        layers = {"lstm": nn.LSTM, "gru": nn.GRU}[cell]
        self.recurrent = layers(n_inputs, width, n_layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(width * (2 if bidirectional else 1), n_outputs)

    def forward(self, x_BTD: Any) -> Any:
        return self.head(self.recurrent(x_BTD)[0].mean(1))


class GPT(nn.Module):
    """GPT-2 with tied logits; attention is PyTorch's fused one, queries, keys and values one product."""

    def __init__(self, width: int, n_heads: int, n_layers: int, vocab_size: int, n_positions: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        table = nn.Embedding(-(-vocab_size // 128) * 128, width)
        self.embed: Any = nn.ModuleDict({"token": table, "position": nn.Embedding(n_positions, width)})
        layers: dict[str, nn.Module] = {f"layer_{i}": GPTLayer(width, n_heads) for i in range(n_layers)}
        self.decoder = nn.ModuleDict({**layers, "final_norm": nn.LayerNorm(width)})

    def forward(self, tokens_BT: Any) -> Any:
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embed["token"](tokens_BT) + self.embed["position"](positions)
        for layer in self.decoder.values():
            x_BTD = layer(x_BTD)
        return F.linear(x_BTD, self.embed["token"].weight[: self.vocab_size])


class GPTLayer(nn.Module):
    """Norm and attention, norm and feed-forward, each a residual branch."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        names = ("query", "key", "value", "output")
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})

    def forward(self, x_BTD: Any) -> Any:
        y_BTD = self.attention_norm(x_BTD)
        heads = [self._heads(self.attention[name](y_BTD)) for name in ("query", "key", "value")]
        query, key, value = heads
        y_BHTK = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTD = x_BTD + self.attention["output"](y_BHTK.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp["up"](self.mlp_norm(x_BTD)), approximate="tanh")
        return x_BTD + self.mlp["down"](hidden)

    def _heads(self, x_BTD: Any) -> Any:
        B, T, D = x_BTD.shape
        return x_BTD.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2)


class CNN(nn.Module):
    """Stages of two 3x3 convolutions with a norm, max-pooling after the first, mean over pixels, dense layers."""

    def __init__(self, n_inputs: int, features: Sequence[int], dense_width: int, n_outputs: int, norm: str) -> None:
        super().__init__()
        self.stages: list[Any] = []
        for i, (n_in, n) in enumerate(zip((n_inputs, *features), features, strict=False)):
            parts: dict[str, nn.Module] = {"conv_0": _conv(n_in, n), "norm_0": make_norm(norm, n)}
            parts |= {"conv_1": _conv(n, n), "norm_1": make_norm(norm, n)}
            stage = nn.ModuleDict(parts)
            self.add_module(f"stage_{i}", stage)
            self.stages.append(stage)
        self.dense, self.head = nn.Linear(features[-1], dense_width), nn.Linear(dense_width, n_outputs)

    def forward(self, x_BCHW: Any) -> Any:
        for stage in self.stages:
            x_BCHW = F.relu(stage["norm_0"](F.max_pool2d(stage["conv_0"](x_BCHW), 2)))
            x_BCHW = F.relu(stage["norm_1"](stage["conv_1"](x_BCHW)))
        return self.head(F.relu(self.dense(x_BCHW.mean((2, 3)))))


class ResNet18(nn.Module):
    """The small stem (3x3, stride 1) and four stages of two basic blocks."""

    def __init__(self, width: int, n_outputs: int, norm: str) -> None:
        super().__init__()
        self.stem_conv, self.stem_norm = _conv(3, width), make_norm(norm, width)
        self.stages: list[Any] = []
        n_in = width
        for i in range(4):
            n, strides = width * 2**i, 1 if i == 0 else 2
            first, second = BasicBlock(n_in, n, strides, norm), BasicBlock(n, n, 1, norm)
            blocks = nn.ModuleDict({"block_0": first, "block_1": second})
            self.add_module(f"stage_{i}", blocks)
            self.stages.append(blocks)
            n_in = n
        self.head = nn.Linear(n_in, n_outputs)

    def forward(self, x_BCHW: Any) -> Any:
        x_BCHW = F.relu(self.stem_norm(self.stem_conv(x_BCHW)))
        for blocks in self.stages:
            for block in blocks.values():
                x_BCHW = block(x_BCHW)
        return self.head(x_BCHW.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, activation after the sum."""

    def __init__(self, n_in: int, n: int, strides: int, norm: str) -> None:
        super().__init__()
        self.conv_0, self.norm_0 = _conv(n_in, n, strides), make_norm(norm, n)
        self.conv_1, self.norm_1 = _conv(n, n), make_norm(norm, n)
        self.is_resized = strides != 1 or n_in != n
        if self.is_resized:
            self.shortcut_conv = nn.Conv2d(n_in, n, 1, strides, bias=False)
            self.shortcut_norm = make_norm(norm, n)

    def forward(self, x: Any) -> Any:
        y = self.norm_1(self.conv_1(F.relu(self.norm_0(self.conv_0(x)))))
        return F.relu((self.shortcut_norm(self.shortcut_conv(x)) if self.is_resized else x) + y)


def _conv(n_in: int, n_out: int, strides: int = 1) -> Any:
    return nn.Conv2d(n_in, n_out, 3, strides, padding=1, bias=False)


def make_norm(kind: str, n: int) -> Any:
    """A norm of `n` channels: "batch", or "group" with the groups that jaxdl takes."""
    if kind == "batch":
        return nn.BatchNorm2d(n)
    return nn.GroupNorm(max(d for d in range(1, 33) if n % d == 0 and n // d >= 2), n)
