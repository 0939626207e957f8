"""The masked language model of `python_bert.py` with six layers, 384 wide, in bfloat16, for one NVIDIA GPU.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.masked_language_model --config configs/python_bert_gpu.py
Not measured.
"""

from experiments.masked_language_model import Config
from experiments.settings import Hardware, Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import Encoder
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=8192),
        data=TextRows(length=256, batch_size=128, eval_batch_size=128, validation=0.01, test=0.02),
        model=Encoder(n_layers=6, width=384, n_heads=6, dropout_rate=0.1),
        optimizer=Optimizer(
            learning_rate=1e-3, warmup=Duration("500 steps"), weight_decay=0.05, clip_norm=1.0, options={"b2": 0.98}
        ),
        loop=Loop(
            length=Duration("5000 steps"),
            eval_every=Duration("500 steps"),
            checkpoint_every=Duration("1000 steps"),
            steps_per_call=10,
        ),
        hardware=Hardware(compute_dtype="bfloat16"),
        out="runs/python_bert_gpu",
    )
