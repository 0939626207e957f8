"""An MLP on the 8x8 digits that come with the package; the data lives on the device, ten steps a call.

Command: python -m experiments.classify_images --config configs/digits_mlp.py
Measured on two cores of an AMD EPYC, JAX 0.10.2:
test accuracy 98.59 % after 9 s, 50,826 parameters.
"""

from experiments.classify_images import Config
from experiments.images import Images
from experiments.settings import MLP, Loop, Optimizer
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Images(name="digits", batch_size=64),
        model=MLP(widths=(256, 128), dropout_rate=0.3),
        optimizer=Optimizer(learning_rate=2e-3, warmup=Duration("1 epoch"), weight_decay=0.05),
        loop=Loop(
            length=Duration("60 epochs"),
            eval_every=Duration("10 epochs"),
            checkpoint_every=Duration("20 epochs"),
            steps_per_call=10,
        ),
        label_smoothing=0.05,
        out="runs/digits_mlp",
    )
