"""FBKD: Improve Object Detection with Feature-based Knowledge Distillation."""

from .config import add_config
from .distiller import FBKDDistiller
from .non_local import NonLocal

SUMMARY = {
    "method": "FBKD",
    "paper": "Zhang & Ma, ICLR 2021",
    "levels": "p2-p6; RetinaNet p3-p7",
    "needs": "",
}

__all__ = ["SUMMARY", "FBKDDistiller", "NonLocal", "add_config"]
