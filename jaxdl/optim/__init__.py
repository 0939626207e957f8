"""Optimizers by name, with rules over parameter paths; schedules, penalties, averages and loss scaling.

Everything here is an Optax transformation, a pure `(init, update)` pair with its state in a NamedTuple, so that the
parts also work alone inside `optax.chain`. Trees may hold `None` in place of frozen leaves.
"""

from jaxdl.optim.averages import EmaState, ema, ema_params, eval_params
from jaxdl.optim.catalog import OPTIMIZERS, options_of
from jaxdl.optim.learning_rate import LearningRateState, find_states, learning_rate_of, with_learning_rate
from jaxdl.optim.loss_scale import DynamicLossScaleState, dynamic_loss_scale, loss_scale_of
from jaxdl.optim.optimizer import make_optimizer
from jaxdl.optim.regularize import add_l1, add_l2, decoupled_weight_decay, penalty, proximal_l1, soft_threshold
from jaxdl.optim.rules import DECAY_RULES, multipliers, scale_by_rules
from jaxdl.optim.schedules import SCHEDULES, make_schedule

__all__ = [
    "DECAY_RULES",
    "OPTIMIZERS",
    "SCHEDULES",
    "DynamicLossScaleState",
    "EmaState",
    "LearningRateState",
    "add_l1",
    "add_l2",
    "decoupled_weight_decay",
    "dynamic_loss_scale",
    "ema",
    "ema_params",
    "eval_params",
    "find_states",
    "learning_rate_of",
    "loss_scale_of",
    "make_optimizer",
    "make_schedule",
    "multipliers",
    "options_of",
    "penalty",
    "proximal_l1",
    "scale_by_rules",
    "soft_threshold",
    "with_learning_rate",
]
