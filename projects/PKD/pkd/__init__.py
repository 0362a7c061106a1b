"""PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient."""

from .config import add_config
from .distiller import PKDDistiller

__all__ = ["PKDDistiller", "add_config"]
