"""What the distillers of heads share: those of an R-CNN box head, and those of a dense head."""

from typing import Any

import torch
from detectron2.config import CfgNode

from .base import Distiller
from .checks import check_weight


def check_equal_classes(student: Any, teacher: Any, *, method: str) -> int:
    """The number of classes that both predict.

    Raises:
        ValueError: they differ: logits of unlike classes mean nothing to each other.
    """
    if student.num_classes != teacher.num_classes:
        raise ValueError(
            f"{method} compares class predictions, but the student has {student.num_classes} "
            f"classes and the teacher {teacher.num_classes}; expected equal ones. Use a teacher "
            "that was trained on the same classes, or a method that compares features."
        )
    return int(student.num_classes)


class HeadDistiller(Distiller):
    """Classes and boxes of a head: a weighted sum of "cls" and "box".

    A method that derives from it says what the two are, by :meth:`_sum` at the end of its forward.
    """

    needs_teacher_heads = True

    def __init__(self, *, name: str, cls_weight: float, box_weight: float, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.scalar_weights = {
            "cls": check_weight("MODEL.DISTILL.HEAD.CLS_WEIGHT", cls_weight),
            "box": check_weight("MODEL.DISTILL.HEAD.BOX_WEIGHT", box_weight),
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The weights of ``MODEL.DISTILL`` and ``MODEL.DISTILL.HEAD``."""
        node = cfg.MODEL.DISTILL.HEAD
        shared = super().from_config(cfg)
        return {**shared, "cls_weight": node.CLS_WEIGHT, "box_weight": node.BOX_WEIGHT}

    def _sum(
        self, cls: torch.Tensor, box: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total = self.scalar_weights["cls"] * cls + self.scalar_weights["box"] * box
        return total, {"cls": cls.detach(), "box": box.detach()}
