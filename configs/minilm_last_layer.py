"""The last layer of MiniLM and what follows it move, on sentences from film reviews.

Needs the weights and the text, two files of the Python package index; docs/finetuning.md says how to get them.
Command: python -m experiments.finetune_text --config configs/minilm_last_layer.py
Not measured.
"""

import dataclasses

from configs import minilm_full
from experiments.finetune_text import Config
from experiments.finetuning import Finetune


def get_config() -> Config:
    full = minilm_full.get_config()
    return dataclasses.replace(
        full,
        finetune=Finetune(method="last_layers", n_layers=1),
        optimizer=dataclasses.replace(full.optimizer, learning_rate=3e-4),
        out="runs/minilm_last_layer",
    )
