"""CLIP on Fashion-MNIST pictures and captions, larger: wide CNN, four-layer text tower, batches of 1,024, bfloat16.

Needs the four files of Fashion-MNIST, for example Debian's package dataset-fashion-mnist, and a GPU.
Command: python -m experiments.contrast_image_text --config configs/fashion_clip_gpu.py
Not measured.
"""

from experiments.contrast_image_text import Config, Text
from experiments.images import Images
from experiments.settings import CNN, Hardware, Loop, Optimizer
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Images(name="fashion_mnist", batch_size=1024, flip=True, crop_padding=1),
        vision=CNN(features=(64, 128, 256), norm="batch", dropout_rate=0.1),
        text=Text(width=128, n_layers=4, n_heads=8),
        width=128,
        optimizer=Optimizer(learning_rate=3e-3, warmup=Duration("1 epoch"), weight_decay=0.05, clip_norm=1.0),
        loop=Loop(length=Duration("20 epochs"), eval_every=Duration("2 epochs"), checkpoint_every=Duration("5 epochs")),
        hardware=Hardware(compute_dtype="bfloat16"),
        out="runs/fashion_clip_gpu",
    )
