"""jaxdl: a functional training library for JAX.

The pieces that a research script needs are here; the rest is a module away (`jaxdl.optim`, `jaxdl.models`,
`jaxdl.data`, `jaxdl.checkpoint`, `jaxdl.loop`, `jaxdl.report`).
"""

from jaxdl import losses, metrics, optim, paths
from jaxdl.errors import JaxdlError
from jaxdl.losses import LossOut
from jaxdl.nonfinite import guard
from jaxdl.optim import make_optimizer, make_schedule
from jaxdl.state import TrainState, create_state
from jaxdl.step import make_eval_step, make_train_step, repeat
from jaxdl.xla_options import compiler_options

__version__ = "0.1.0"

__all__ = [
    "JaxdlError",
    "LossOut",
    "TrainState",
    "compiler_options",
    "create_state",
    "guard",
    "losses",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "metrics",
    "optim",
    "paths",
    "repeat",
]
