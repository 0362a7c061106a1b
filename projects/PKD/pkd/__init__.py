"""PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient."""

from .config import add_config
from .distiller import PKDDistiller

SUMMARY = {
    "method": "PKD",
    "paper": "Cao et al., NeurIPS 2022",
    "levels": "p2-p5; RetinaNet p3-p6",
    "needs": "",
}

__all__ = ["SUMMARY", "PKDDistiller", "add_config"]
