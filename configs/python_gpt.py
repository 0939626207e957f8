"""A small GPT on the source of Python's standard library, in byte-level BPE.

Needs the extra `text` (pip install 'jaxdl[text]'); with --config.tokenizer.kind=bytes it needs nothing.
Command: python -m experiments.language_model --config configs/python_gpt.py
Not measured.
"""

from experiments.language_model import Config
from experiments.settings import Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import GPT
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=2048),
        data=TextRows(length=256, batch_size=8, eval_batch_size=32, validation=0.01, test=0.02),
        model=GPT(n_layers=4, width=128, n_heads=4),
        optimizer=Optimizer(
            learning_rate=4e-3, warmup=Duration("50 steps"), weight_decay=0.1, clip_norm=1.0, options={"b2": 0.98}
        ),
        loop=Loop(
            length=Duration("1000 steps"), eval_every=Duration("500 steps"), checkpoint_every=Duration("250 steps")
        ),
        prompt="class Parser:\n    def __init__(self",
        out="runs/python_gpt",
    )
