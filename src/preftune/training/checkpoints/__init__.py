"""Checkpoints that survive a crash at any instant, and runs that go on from them as if nothing had happened."""

from preftune.training.checkpoints.folders import (
    Found,
    find_checkpoint,
    list_checkpoints,
    recover,
    rotate,
)
from preftune.training.checkpoints.manifest import InvalidCheckpoint, Manifest, verify
from preftune.training.checkpoints.trainer import CheckpointedTrainer

__all__ = [
    "CheckpointedTrainer",
    "Found",
    "InvalidCheckpoint",
    "Manifest",
    "find_checkpoint",
    "list_checkpoints",
    "recover",
    "rotate",
    "verify",
]
