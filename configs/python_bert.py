"""A small BERT that guesses hidden tokens in the source of Python's standard library.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.masked_language_model --config configs/python_bert.py
Not measured.
"""

from experiments.masked_language_model import Config
from experiments.settings import Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import Encoder
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=2048),
        data=TextRows(length=128, batch_size=32, eval_batch_size=64, validation=0.01, test=0.02),
        model=Encoder(n_layers=3, width=128, n_heads=4),
        optimizer=Optimizer(
            learning_rate=3e-3, warmup=Duration("100 steps"), weight_decay=0.05, clip_norm=1.0, options={"b2": 0.98}
        ),
        loop=Loop(
            length=Duration("1000 steps"), eval_every=Duration("250 steps"), checkpoint_every=Duration("250 steps")
        ),
        out="runs/python_bert",
    )
