"""Spelled-out dates to digits: a bidirectional LSTM reads, an LSTM with additive attention writes; needs no download.

Command: python -m experiments.sequence_to_sequence --config configs/dates_lstm.py
Measured on two cores of an AMD EPYC shared with other work, JAX 0.10.2:
99.95 % of 2,000 test dates decoded without a mistake after 4 min 27 s, 482,478 parameters.
"""

from experiments.dates import Dates
from experiments.sequence_to_sequence import Config, Network
from experiments.settings import Loop, Optimizer
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Dates(),
        model=Network(width=128, embed_width=32),
        optimizer=Optimizer(learning_rate=3e-3, warmup=Duration(100), clip_norm=1.0),
        loop=Loop(
            length=Duration("2 epochs"),
            eval_every=Duration("1 epoch"),
            checkpoint_every=Duration("1 epoch"),
            steps_per_call=10,
        ),
        out="runs/dates_lstm",
    )
