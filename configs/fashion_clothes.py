"""A narrow ResNet on one half of Fashion-MNIST's classes: the base that `configs/fashion_shoes_*.py` are tuned from.

Needs the four files of Fashion-MNIST, for example Debian's package dataset-fashion-mnist.
Command: python -m experiments.classify_images --config configs/fashion_clothes.py
Measured on two cores of an AMD EPYC shared with other work, JAX 0.10.2:
test accuracy 93.78 % of five classes after four epochs, 77,429 parameters.
"""

from experiments.classify_images import Config
from experiments.images import Images
from experiments.settings import Loop, Optimizer, ResNet
from jaxdl.config import Duration

CLOTHES = (0, 1, 2, 3, 4)  # T-shirt, trousers, pullover, dress, coat


def get_config() -> Config:
    return Config(
        data=Images(name="fashion_mnist", classes=CLOTHES, batch_size=128, flip=True),
        model=ResNet(stage_sizes=(1, 1, 1), width=16, stem="pooled", norm="batch"),
        optimizer=Optimizer(learning_rate=3e-3, warmup=Duration("1 epoch"), weight_decay=0.02),
        loop=Loop(length=Duration("4 epochs"), eval_every=Duration("1 epoch"), checkpoint_every=Duration("1 epoch")),
        out="runs/fashion_clothes",
    )
