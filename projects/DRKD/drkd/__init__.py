"""DRKD: Dual Relation Knowledge Distillation for Object Detection."""

from .config import add_config
from .distiller import DRKDDistiller

SUMMARY = {
    "method": "DRKD",
    "paper": "Ni et al., IJCAI 2023",
    "levels": "all levels of the FPN; boxes on the first two",
    "needs": "ground truth",
}

__all__ = ["SUMMARY", "DRKDDistiller", "add_config"]
