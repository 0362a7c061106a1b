"""FBKD: Improve Object Detection with Feature-based Knowledge Distillation."""

from .config import add_config
from .distiller import FBKDDistiller
from .non_local import NonLocal

__all__ = ["FBKDDistiller", "NonLocal", "add_config"]
