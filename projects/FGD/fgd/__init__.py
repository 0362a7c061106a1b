"""FGD: Focal and Global Knowledge Distillation for Detectors."""

from .config import add_config
from .distiller import FGDDistiller, GlobalContext

__all__ = ["FGDDistiller", "GlobalContext", "add_config"]
