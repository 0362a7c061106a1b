"""Weights that one can rely on: whole, of the right architecture, finite."""

from .reading import Weights, local_file, read_checkpoint, read_file, read_weights
from .strict import load_strictly

__all__ = [
    "Weights",
    "load_strictly",
    "local_file",
    "read_checkpoint",
    "read_file",
    "read_weights",
]
