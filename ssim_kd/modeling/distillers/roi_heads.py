"""Distillation of an R-CNN box head.

The functions are for methods to reuse; the distiller at the end is their plain use. Shapes: R boxes
of all images, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import nn
from torch.nn import functional as F

from ...ops.options import check_number
from ..teacher import FrozenTeacher
from .base import DISTILLER_REGISTRY, Distiller, part_keys
from .batch import DistillBatch


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


def check_roi_heads(student: Any, teacher: FrozenTeacher, *, method: str) -> None:
    """Check that both detectors have Detectron2's StandardROIHeads with equal classes.

    Raises:
        ValueError: one of them has another head.
    """
    for whose, model in (("student", student), ("teacher", teacher.model)):
        heads = getattr(model, "roi_heads", None)
        if not isinstance(heads, StandardROIHeads) or isinstance(heads, CascadeROIHeads):
            found = type(model if heads is None else heads).__name__
            raise ValueError(
                f"{method} serves R-CNN detectors with StandardROIHeads, but the {whose} has "
                f"{found}."
            )
    check_equal_classes(student.roi_heads, teacher.model.roi_heads, method=method)
    known = teacher.levels
    missing = [k for k in teacher.model.roi_heads.box_in_features if k not in known]
    if missing:
        raise ValueError(f"{method}: the teacher's box head reads {missing}, which it lacks.")


def roi_predictions(
    detector: Any, maps: Mapping[str, torch.Tensor], boxes: Sequence[Boxes]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a box head predicts for given boxes.

    Args:
        detector: with StandardROIHeads.
        maps: (N, C, H, W) by level, those of ``roi_heads.box_in_features`` at least.
        boxes: of each image, in pixels.

    Returns:
        class logits (R, K + 1), background last, and box deltas (R, 4 K) or (R, 4); float32.
    """
    heads = detector.roi_heads
    with torch.autocast(boxes[0].device.type, enabled=False):
        pooled = heads.box_pooler([maps[k].float() for k in heads.box_in_features], list(boxes))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
    return logits, deltas


def proposals(student: Mapping[str, Any]) -> list[Boxes]:
    """The proposals that the student trains with, of each image.

    Args:
        student: the student's tapped outputs, "roi_heads.box_pooler" among them.
    """
    boxes: list[Boxes] = student["roi_heads.box_pooler"][0].inputs[1]
    return boxes


@torch.no_grad()
def teacher_predictions(
    student: Mapping[str, Any], teacher: Mapping[str, torch.Tensor], batch: DistillBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's box head on the teacher's maps, for the student's proposals.

    Args:
        student, teacher: the tapped outputs, see :func:`proposals` and :func:`roi_predictions`.
        batch: its teacher is asked.

    Returns:
        as :func:`roi_predictions`, without gradient.
    """
    return roi_predictions(batch.teacher, teacher, proposals(student))


def softmax_kd(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the rows.

    Args:
        student, teacher: logits (R, K).
        temperature: T > 0.

    Returns:
        scalar; 0 without rows.
    """
    s = (student.float() / temperature).log_softmax(dim=1)
    t = (teacher.float() / temperature).log_softmax(dim=1)
    total = F.kl_div(s, t, reduction="sum", log_target=True)
    return total * temperature**2 / max(len(student), 1)


def top_class_delta_l1(
    student: torch.Tensor, teacher: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """|deltas of the teacher's most likely class - the student's|, weighted by its probability.

    Args:
        student, teacher: box deltas (R, 4 K) or, class-agnostic, (R, 4).
        teacher_logits: (R, K + 1), background last.

    Returns:
        scalar: sum of the weighted differences / (4 sum of the weights); 0 without rows.
    """
    if len(student) == 0:
        return student.float().sum()
    probability, top = teacher_logits.float().softmax(dim=1)[:, :-1].max(dim=1)

    def of_top(deltas: torch.Tensor) -> torch.Tensor:
        if deltas.shape[1] == 4:
            return deltas.float()
        return deltas.float().view(len(deltas), -1, 4)[torch.arange(len(top)), top]

    difference = (of_top(student) - of_top(teacher)).abs().sum(dim=1)
    return (probability * difference).sum() / (4 * probability.sum()).clamp(min=1e-6)


class HeadDistiller(Distiller):
    """A method whose loss has the parts "cls" and "box"."""

    keys = part_keys("HEAD", "cls", "box")
    defaults: Mapping[str, Any] = {"part_weights": {"cls": 1.0, "box": 1.0}}
    needs_teacher_heads = True

    def __init__(
        self,
        *,
        name: str,
        cls_weight: float | None = None,
        box_weight: float | None = None,
        part_weights: Mapping[str, float | None] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            cls_weight, box_weight: the same as part_weights {"cls": ..., "box": ...}.
            part_weights: see :class:`Distiller`.
            kwargs: of :class:`Distiller`.

        Raises:
            ValueError: a value out of its range.
        """
        weights = dict(part_weights or {})
        for part, weight in (("cls", cls_weight), ("box", box_weight)):
            if weight is not None:
                weights[part] = check_number(f"{part}_weight", weight, least=0)
        super().__init__(name=name, part_weights=weights, **kwargs)


class RoIHeadDistiller(Distiller):
    """A method that compares box heads on the proposals that the student trains with."""

    student_taps: Sequence[str] = ("roi_heads.box_pooler", "roi_heads.box_predictor")
    needs_teacher_heads = True

    def bind(self, student: nn.Module, teacher: FrozenTeacher) -> None:
        """See :func:`check_roi_heads`."""
        check_roi_heads(student, teacher, method=type(self).__name__)
        self.teacher_taps = list(teacher.model.roi_heads.box_in_features)

    def student_predictions(
        self, student: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The class logits and box deltas that are brought to the teacher's: the student's own."""
        logits, deltas = student["roi_heads.box_predictor"][0].output
        return logits, deltas


@DISTILLER_REGISTRY.register()
class RCNNHeadDistiller(RoIHeadDistiller, HeadDistiller):
    """Box head against box head, on the proposals that the student trains with.

    :func:`softmax_kd` of the class logits and :func:`top_class_delta_l1` of the box deltas. The
    teacher's box head reads the teacher's maps.
    """

    keys = {"temperature": "HEAD.TEMPERATURE"}
    defaults = {"temperature": 1.0}

    @configurable
    def __init__(
        self, *, name: str = "rcnn_head", temperature: float | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: T of the softmax, > 0; None for the method's own.
            kwargs: of :class:`HeadDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        self.temperature = check_number("temperature", temperature, above=0, optional=True)

    def parts(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Distiller.parts`."""
        logits, deltas = self.student_predictions(student, batch)
        soft_logits, soft_deltas = teacher_predictions(student, teacher, batch)
        return {
            "cls": softmax_kd(logits, soft_logits, self.temperature),
            "box": top_class_delta_l1(deltas, soft_deltas, soft_logits),
        }
