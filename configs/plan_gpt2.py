"""GPT-2 with 124 million parameters on rows of 1024 tokens, in bfloat16, for one NVIDIA H100.

It is for planning; training needs a corpus of its size (--config.corpus) and its tokenizer.
Command: python -m jaxdl plan --config configs/plan_gpt2.py --topology h100:1
"""

from experiments import language_model
from experiments.settings import Hardware, Loop, Optimizer
from experiments.text import TokenizerChoice
from experiments.text_models import GPT
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> language_model.Config:
    return language_model.Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=50257),
        data=TextRows(length=1024, batch_size=32, validation=0.01, test=0.01),
        model=GPT(n_layers=12, width=768, n_heads=12),
        optimizer=Optimizer(learning_rate=6e-4, warmup=Duration("2000 steps"), weight_decay=0.1, clip_norm=1.0),
        loop=Loop(
            length=Duration("100000 steps"),
            eval_every=Duration("2000 steps"),
            checkpoint_every=Duration("2000 steps"),
        ),
        hardware=Hardware(compute_dtype="bfloat16"),
        out="runs/plan_gpt2",
    )
