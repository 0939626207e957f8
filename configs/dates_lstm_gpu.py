"""The date translation of `dates_lstm.py` on every date and with a wider network of two layers, for one NVIDIA GPU.

Command: python -m experiments.sequence_to_sequence --config configs/dates_lstm_gpu.py
Not measured.
"""

from experiments.dates import Dates
from experiments.sequence_to_sequence import Config, Network
from experiments.settings import Loop, Optimizer
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Dates(n_train=140_000, batch_size=512, eval_batch_size=1_000),
        model=Network(width=512, embed_width=64, n_encoder_layers=2, n_decoder_layers=2, dropout_rate=0.1),
        beam_width=4,
        optimizer=Optimizer(learning_rate=1e-3, warmup=Duration(200), clip_norm=1.0),
        loop=Loop(
            length=Duration("10 epochs"),
            eval_every=Duration("1 epoch"),
            checkpoint_every=Duration("1 epoch"),
            steps_per_call=50,
        ),
        out="runs/dates_lstm_gpu",
    )
