"""Pretrained weights of Hugging Face, in and out: `load`, `save`, and the proof that both sides agree."""

from jaxdl.pretrained.family import Family
from jaxdl.pretrained.folder import Pretrained, load, save
from jaxdl.pretrained.ledger import Ledger, PretrainedError
from jaxdl.pretrained.mapping import to_params, to_tensors
from jaxdl.pretrained.registry import FAMILIES
from jaxdl.pretrained.report import Report
from jaxdl.pretrained.verify import verify_parity

__all__ = [
    "FAMILIES",
    "Family",
    "Ledger",
    "Pretrained",
    "PretrainedError",
    "Report",
    "load",
    "save",
    "to_params",
    "to_tensors",
    "verify_parity",
]
