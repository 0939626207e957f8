"""The GPT of `python_gpt.py` with 6 layers, 384 wide, in bfloat16, on more and longer rows, for one NVIDIA GPU.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.language_model --config configs/python_gpt_gpu.py
Not measured.
"""

from experiments.language_model import Config
from experiments.settings import Hardware, Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import GPT
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=8192),
        data=TextRows(length=512, batch_size=64, eval_batch_size=64, validation=0.01, test=0.02),
        model=GPT(n_layers=6, width=384, n_heads=6, dropout_rate=0.1),
        optimizer=Optimizer(
            learning_rate=2e-3, warmup=Duration("100 steps"), weight_decay=0.1, clip_norm=1.0, options={"b2": 0.98}
        ),
        loop=Loop(
            length=Duration("2000 steps"),
            eval_every=Duration("250 steps"),
            checkpoint_every=Duration("250 steps"),
            steps_per_call=10,
        ),
        hardware=Hardware(compute_dtype="bfloat16"),
        prompt="class Parser:\n    def __init__(self",
        out="runs/python_gpt_gpu",
    )
