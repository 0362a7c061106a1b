"""FGD: Focal and Global Knowledge Distillation for Detectors."""

from .config import add_config
from .distiller import FGDDistiller, GlobalContext

SUMMARY = {
    "method": "FGD",
    "paper": "Yang et al., CVPR 2022",
    "levels": "p2-p5; RetinaNet p3-p7",
    "needs": "ground truth",
}

__all__ = ["SUMMARY", "FGDDistiller", "GlobalContext", "add_config"]
