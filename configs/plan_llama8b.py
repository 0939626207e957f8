"""A Llama of 8 billion parameters, the sizes of Llama 3, on rows of 2048 tokens, in bfloat16, for 256 TPU chips.

It is for planning; training needs a corpus of its size (--config.corpus) and its tokenizer.
Command: python -m jaxdl plan --config configs/plan_llama8b.py --topology v5e:16x16
"""

from experiments import language_model
from experiments.settings import Hardware, Loop, Optimizer, Parallel
from experiments.text import TokenizerChoice
from experiments.text_models import LlamaLike
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> language_model.Config:
    return language_model.Config(
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=128256),
        data=TextRows(length=2048, batch_size=256, validation=0.01, test=0.01),
        model=LlamaLike(
            n_layers=32,
            width=4096,
            n_heads=32,
            n_kv_heads=8,
            hidden=14336,
            is_tied=False,
            layout="scanned",
            remat="full",
        ),
        optimizer=Optimizer(learning_rate=3e-4, warmup=Duration("2000 steps"), weight_decay=0.1, clip_norm=1.0),
        loop=Loop(
            length=Duration("100000 steps"),
            eval_every=Duration("2000 steps"),
            checkpoint_every=Duration("2000 steps"),
        ),
        hardware=Hardware(compute_dtype="bfloat16"),
        parallel=Parallel(mesh="data=256", sharding="fsdp"),
        out="runs/plan_llama8b",
    )
