"""VFM: a frozen vision foundation model as the teacher of one level."""

from .config import add_config
from .distiller import VFMDistiller

SUMMARY = {
    "method": "VFM",
    "paper": "cosine with the patch tokens of a timm ViT, as of DINOv3",
    "levels": "one",
    "needs": "timm; a ViT and its weights",
}

__all__ = ["SUMMARY", "VFMDistiller", "add_config"]
