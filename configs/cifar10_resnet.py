"""ResNet-18 on CIFAR-10, read from its binary version or prepared by TensorFlow Datasets.

Needs the folder of the binary version (`data_batch_1.bin` ... `test_batch.bin`) in --config.data.directory, or a set
prepared by TensorFlow Datasets with --config.data.name=tfds --config.data.tfds_name=cifar10.
Command: python -m experiments.classify_images --config configs/cifar10_resnet.py --config.data.directory FOLDER
Not measured: no machine that this was written on had the data; the tests run it on random pictures.
"""

from experiments.classify_images import Config
from experiments.images import Images
from experiments.settings import Loop, Optimizer, ResNet
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Images(name="cifar10", batch_size=128, flip=True, crop_padding=4),
        model=ResNet(stem="small", norm="batch"),
        optimizer=Optimizer(
            name="nesterov", learning_rate=0.1, warmup=Duration("2 epochs"), l2=5e-4, options={"momentum": 0.9}
        ),
        loop=Loop(length=Duration("30 epochs"), eval_every=Duration("2 epochs"), checkpoint_every=Duration("2 epochs")),
        out="runs/cifar10_resnet",
    )
