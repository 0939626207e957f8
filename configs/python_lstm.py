"""An LSTM on the source of Python's standard library, beside the GPT of `python_gpt.py`: same text, tokens and rows.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.language_model --config configs/python_lstm.py
Measured on two cores of an AMD EPYC shared with other work, JAX 0.10.2, on the library of Python 3.11.7 (730 files):
1.85 bits per byte of held-out files after 15 min 20 s (5 min of processor time), 1,576,960 parameters.
"""

from experiments.language_model import Config
from experiments.settings import Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import RNN
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=2048),
        data=TextRows(length=256, batch_size=8, eval_batch_size=32, validation=0.01, test=0.02),
        model=RNN(cell="lstm", n_layers=1, width=256),
        optimizer=Optimizer(learning_rate=4e-3, warmup=Duration("50 steps"), clip_norm=1.0),
        loop=Loop(
            length=Duration("1000 steps"), eval_every=Duration("500 steps"), checkpoint_every=Duration("250 steps")
        ),
        prompt="class Parser:\n    def __init__(self",
        out="runs/python_lstm",
    )
