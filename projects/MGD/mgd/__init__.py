"""MGD: Masked Generative Distillation."""

from .config import add_config
from .distiller import MGDDistiller

SUMMARY = {
    "method": "MGD",
    "paper": "Yang et al., ECCV 2022",
    "levels": "p2-p5; RetinaNet p3-p7",
    "needs": "",
}

__all__ = ["SUMMARY", "MGDDistiller", "add_config"]
