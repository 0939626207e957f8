"""Networks as Flax Linen modules. The path of a parameter is public: see each class's `Paths`."""

from jaxdl.models.checks import ModelError
from jaxdl.models.cnn import CNN
from jaxdl.models.convnext import ConvNeXt, ConvNeXtBlock, depthwise_conv
from jaxdl.models.layers import conv, drop_path, dropout, head, make_activation, make_norm
from jaxdl.models.mlp import MLP
from jaxdl.models.pooling import max_pool
from jaxdl.models.resnet import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
)

__all__ = [
    "CNN",
    "MLP",
    "BasicBlock",
    "BottleneckBlock",
    "ConvNeXt",
    "ConvNeXtBlock",
    "ModelError",
    "PreActBasicBlock",
    "PreActBottleneckBlock",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "conv",
    "depthwise_conv",
    "drop_path",
    "dropout",
    "head",
    "make_activation",
    "make_norm",
    "max_pool",
]
