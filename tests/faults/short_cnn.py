"""The CNN of `configs/digits_cnn.py` for 240 steps (10.7 epochs), a checkpoint every 10: the run that is killed."""

import dataclasses

from configs import digits_cnn
from experiments.classify_images import Config
from jaxdl.config import Duration


def get_config() -> Config:
    config = digits_cnn.get_config()
    loop = dataclasses.replace(
        config.loop,
        length=Duration("240 steps"),
        eval_every=Duration("25 steps"),
        checkpoint_every=Duration("10 steps"),
        log_every=5,
    )
    return dataclasses.replace(config, loop=loop, out="run")
