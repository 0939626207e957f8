"""Which of eight packages of Python's standard library a dozen lines of source are from; whole files held out.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.classify_text --config configs/python_packages.py
Measured on two cores of an AMD EPYC shared with other work, JAX 0.10.2, on the library of Python 3.11.7:
test accuracy 87.76 % after 13 min 36 s (6 min of processor time), 955,272 parameters.
"""

from experiments.classify_text import Config
from experiments.settings import Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import Encoder
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=4096),
        data=TextRows(length=128, batch_size=32, eval_batch_size=128, validation=0.1, test=0.15),
        model=Encoder(n_layers=2, width=128, n_heads=4, dropout_rate=0.1),
        optimizer=Optimizer(learning_rate=1e-3, warmup=Duration("50 steps"), weight_decay=0.05, clip_norm=1.0),
        loop=Loop(length=Duration("3 epochs"), eval_every=Duration("1 epoch"), checkpoint_every=Duration("1 epoch")),
        out="runs/python_packages",
    )
