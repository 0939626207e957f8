"""Skip-gram embeddings of the names in the source of Python's own library; needs no download.

Command: python -m experiments.embed_words --config configs/python_skipgram.py
Measured on two cores of an AMD EPYC shared with other work, JAX 0.10.2, on the library of Python 3.11.7 (730 files):
1,247,157 names, 17,673 different; loss 2.66 after 10 epochs in 27 s (289,000 to 472,000 words/s); "lock" is nearest to
acquire, acquired, Lock.
"""

from experiments.embed_words import Config, Words
from experiments.settings import Loop
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Words(name="python", min_count=5, window=5, subsample=1e-3),
        width=100,
        loop=Loop(
            length=Duration("10 epochs"), checkpoint_every=Duration("5 epochs"), log_every=200, steps_per_call=10
        ),
        probes=("list", "write", "TypeError", "socket", "int", "False", "index", "parent", "lock"),
        out="runs/python_skipgram",
    )
