"""The LSTM of `python_lstm.py` with two layers, 1,024 wide, for one NVIDIA GPU, where cuDNN computes it.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.language_model --config configs/python_lstm_gpu.py
Not measured.
"""

from experiments.language_model import Config
from experiments.settings import Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import RNN
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=8192),
        data=TextRows(length=512, batch_size=64, eval_batch_size=64, validation=0.01, test=0.02),
        model=RNN(cell="lstm", n_layers=2, width=1024, dropout_rate=0.2),
        optimizer=Optimizer(learning_rate=2e-3, warmup=Duration("100 steps"), clip_norm=1.0),
        loop=Loop(
            length=Duration("2000 steps"),
            eval_every=Duration("250 steps"),
            checkpoint_every=Duration("250 steps"),
            steps_per_call=10,
        ),
        prompt="class Parser:\n    def __init__(self",
        out="runs/python_lstm_gpu",
    )
