"""MGD: Masked Generative Distillation."""

from .config import add_config
from .distiller import MGDDistiller

__all__ = ["MGDDistiller", "add_config"]
