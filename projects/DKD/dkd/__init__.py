"""DKD: Decoupled Knowledge Distillation."""

from .config import add_config
from .distiller import DKDDistiller

SUMMARY = {
    "method": "DKD",
    "paper": "Zhao et al., CVPR 2022",
    "levels": "RoI head of R-CNN",
    "needs": "teacher's heads, equal classes",
}

__all__ = ["SUMMARY", "DKDDistiller", "add_config"]
