"""Verified checkpoints: `Store` saves and restores a state, `restore_params` fills a model from part of one."""

from jaxdl.checkpoint.manifest import CheckpointCorrupt, CheckpointError, CheckpointMismatch, Manifest, verify
from jaxdl.checkpoint.restore import Ledger, restore_params
from jaxdl.checkpoint.store import Restored, Store

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMismatch",
    "Ledger",
    "Manifest",
    "Restored",
    "Store",
    "restore_params",
    "verify",
]
