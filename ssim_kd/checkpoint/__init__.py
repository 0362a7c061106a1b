"""Checkpoints: read with suspicion, loaded strictly, written atomically, resumed from."""

from .checkpointer import ResumeError, StudentCheckpointer
from .files import (
    Weights,
    local_file,
    read_checkpoint,
    read_file,
    read_weights,
    sha256_of,
)
from .folder import BEST, FINAL, checkpoints_in, is_of_last_run
from .strict import load_strictly

__all__ = [
    "BEST",
    "FINAL",
    "ResumeError",
    "StudentCheckpointer",
    "Weights",
    "checkpoints_in",
    "is_of_last_run",
    "load_strictly",
    "local_file",
    "read_checkpoint",
    "read_file",
    "read_weights",
    "sha256_of",
]
