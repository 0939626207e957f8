"""A small MLP on the digits, twenty steps: the run that the fault tests break."""

from experiments.classify_images import Config
from experiments.images import Images
from experiments.settings import MLP, Loop, Optimizer, Parallel
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Images(name="digits", batch_size=32, eval_batch_size=100),
        model=MLP(widths=(8,)),
        optimizer=Optimizer(learning_rate=1e-3),
        loop=Loop(
            length=Duration("20 steps"),
            eval_every=Duration("10 steps"),
            checkpoint_every=Duration("5 steps"),
            log_every=5,
        ),
        parallel=Parallel(mesh="data=1"),
        out="run",
    )
