"""CrossKD: Cross-Head Knowledge Distillation for Object Detection. Without the crossing: BCKD."""

from .config import add_config
from .distiller import CrossKDDistiller
from .rcnn import CrossKDRCNNDistiller

SUMMARY = {
    "method": "CrossKD; BCKD at DEPTH 0",
    "paper": "Wang et al., CVPR 2024; Yang et al., ICCV 2023",
    "levels": "dense heads (RetinaNet, FCOS); RoI head of R-CNN",
    "needs": "teacher's heads, equal classes and anchors, ground truth for the number of positives",
}

__all__ = ["SUMMARY", "CrossKDDistiller", "CrossKDRCNNDistiller", "add_config"]
