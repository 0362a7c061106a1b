"""Distillation of head outputs: of an R-CNN box head, and of a dense head (RetinaNet, FCOS).

The functions are for methods to reuse; the two distillers at the end are their plain use. Shapes:
N images, R boxes or anchors, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from fvcore.nn import giou_loss
from torch import nn
from torch.nn import functional as F

from ..teacher import FrozenTeacher
from .base import DISTILLER_REGISTRY, DistillBatch, Distiller, check_weight


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


# R-CNN


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


# Dense heads


class DensePredictions(NamedTuple):
    """The predictions of a dense head for all anchors, level after level.

    Attributes:
        logits: (N, R, K) float32.
        deltas: (N, R, 4) float32.
        anchors: boxes in pixels by level, R in all; R = sum of H W A over the levels.
    """

    logits: torch.Tensor
    deltas: torch.Tensor
    anchors: list[Boxes]


def check_dense_heads(student: Any, teacher: FrozenTeacher, *, method: str) -> None:
    """Check that the dense heads predict for the same anchors and classes.

    Raises:
        ValueError: no dense head, or classes, anchors or strides that differ.
    """
    for whose, model in (("student", student), ("teacher", teacher.model)):
        if not isinstance(model, DenseDetector):
            raise ValueError(
                f"{method} serves dense detectors (RetinaNet, FCOS), but the {whose} is a "
                f"{type(model).__name__}."
            )
    check_equal_classes(student, teacher.model, method=method)
    for what, of in (
        ("anchors a cell", lambda m: list(m.anchor_generator.num_anchors)),
        ("strides", lambda m: [m.backbone.output_shape()[k].stride for k in m.head_in_features]),
        ("box coding", lambda m: type(m.box2box_transform).__name__),
    ):
        ours, theirs = of(student), of(teacher.model)
        if ours != theirs:
            raise ValueError(
                f"{method} compares predictions anchor by anchor, but student and teacher have "
                f"other {what}: {ours} and {theirs}."
            )


def dense_predictions(detector: Any, outputs: Sequence[Sequence[torch.Tensor]]) -> DensePredictions:
    """Arrange what a dense head returned by anchors.

    Args:
        detector: a RetinaNet or FCOS.
        outputs: logits and deltas, each (N, A K, H, W) and (N, A 4, H, W) by level; what follows
            them (FCOS' centerness) is not used.
    """
    logits, deltas = outputs[:2]
    return DensePredictions(
        torch.cat([permute_to_N_HWA_K(x, detector.num_classes) for x in logits], dim=1).float(),
        torch.cat([permute_to_N_HWA_K(x, 4) for x in deltas], dim=1).float(),
        detector.anchor_generator(list(logits)),
    )


def teacher_dense_outputs(
    teacher: Any, maps: Mapping[str, torch.Tensor]
) -> Sequence[Sequence[torch.Tensor]]:
    """The outputs of a frozen dense head for its own maps (N, C, H, W) by level."""
    features = [maps[level].float() for level in teacher.head_in_features]
    with torch.no_grad(), torch.autocast(features[0].device.type, enabled=False):
        outputs: Sequence[Sequence[torch.Tensor]] = teacher.head(features)
    return outputs


def decode(detector: Any, predictions: DensePredictions) -> torch.Tensor:
    """Boxes (N, R, 4) in pixels out of the deltas of a dense head."""
    deltas = predictions.deltas
    n, r = deltas.shape[:2]
    anchors = Boxes.cat(predictions.anchors).tensor.expand(n, r, 4).reshape(-1, 4)
    boxes = detector.box2box_transform.apply_deltas(deltas.reshape(-1, 4), anchors)
    return boxes.view(n, r, 4)


@torch.no_grad()
def anchor_targets(
    detector: Any, anchors: list[Boxes], batch: DistillBatch
) -> tuple[torch.Tensor, list[Any]]:
    """What the detector's own matching assigns to each anchor.

    Returns:
        classes (N, R): K is background, -1 is ignored; and the matched boxes (R, 4) of each image,
        tensors or Boxes as the detector has them, of any value where the class is not positive.

    Raises:
        ValueError: the batch has no ground truth.
    """
    if batch.instances is None:
        raise ValueError("The training images have no instances, which the method needs.")
    labels, boxes = detector.label_anchors(anchors, batch.instances)
    return torch.stack(list(labels)), list(boxes)


def anchor_labels(detector: Any, anchors: list[Boxes], batch: DistillBatch) -> torch.Tensor:
    """The classes of :func:`anchor_targets`."""
    return anchor_targets(detector, anchors, batch)[0]


def anchor_normalizer(detector: Any, positive: torch.Tensor) -> Any:
    """The number of positive anchors by which the detector divides its own losses.

    Detectron2's dense detectors keep a running mean of it, ``loss_normalizer``, without which a
    batch with few or no positives would weigh many times as much as the others.

    Args:
        detector: after its forward of this step.
        positive: (N, R) bool; their number, at least 1, is taken of a detector without that mean.
    """
    return getattr(detector, "loss_normalizer", None) or positive.sum().clamp(min=1)


def quality_bce(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """|sigmoid(s) - sigmoid(t)| BCE(s, sigmoid(t)) of each logit (CrossKD and BCKD, eq. of L_cls).

    Args:
        student, teacher: logits of equal shape. The factor in front is differentiated as well.
    """
    target = teacher.sigmoid()
    bce = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (student.sigmoid() - target).abs() * bce


def weighted_giou(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The sum over boxes of weight (1 - GIoU).

    Args:
        student, teacher: boxes (..., 4) in pixels.
        weights: (...), >= 0.
    """
    return (giou_loss(student, teacher, reduction="none") * weights).sum()


# The distillers


class _HeadDistiller(Distiller):
    """Weights of the two parts, which both head distillers have."""

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


@DISTILLER_REGISTRY.register()
class RCNNHeadDistiller(_HeadDistiller):
    """Box head against box head, on the proposals that the student trains with.

    :func:`softmax_kd` of the class logits and :func:`top_class_delta_l1` of the box deltas. The
    teacher's box head reads the teacher's maps.
    """

    student_taps: Sequence[str] = ("roi_heads.box_pooler", "roi_heads.box_predictor")

    @configurable
    def __init__(
        self,
        *,
        name: str = "rcnn_head",
        temperature: float = 1.0,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: T of the softmax, > 0.
            cls_weight, box_weight: of the two parts, >= 0.
            kwargs: of :class:`Distiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, cls_weight=cls_weight, box_weight=box_weight, **kwargs)
        if not temperature > 0:
            raise ValueError(
                f"MODEL.DISTILL.HEAD.TEMPERATURE is {temperature}; expected a number > 0."
            )
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The weights and the temperature."""
        return {**super().from_config(cfg), "temperature": cfg.MODEL.DISTILL.HEAD.TEMPERATURE}

    def bind(self, student: nn.Module, teacher: FrozenTeacher) -> None:
        """See :func:`check_roi_heads`."""
        check_roi_heads(student, teacher, method=type(self).__name__)
        self.teacher_taps = list(teacher.model.roi_heads.box_in_features)

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :meth:`Distiller.forward`."""
        boxes = student["roi_heads.box_pooler"][0].inputs[1]
        logits, deltas = student["roi_heads.box_predictor"][0].output
        with torch.no_grad():
            soft_logits, soft_deltas = roi_predictions(batch.teacher, teacher, boxes)
        cls = softmax_kd(logits, soft_logits, self.temperature)
        return self._sum(cls, top_class_delta_l1(deltas, soft_deltas, soft_logits))


@DISTILLER_REGISTRY.register()
class DenseHeadDistiller(_HeadDistiller):
    """Dense head against dense head, anchor by anchor.

    :func:`quality_bce` of the class logits over the anchors that are not ignored, and
    :func:`weighted_giou` of the boxes, weighted by the teacher's highest class probability; both
    divided by the number of positive anchors.
    """

    student_taps: Sequence[str] = ("head",)

    @configurable
    def __init__(
        self,
        *,
        name: str = "dense_head",
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            cls_weight, box_weight: of the two parts, >= 0.
            kwargs: of :class:`Distiller`.
        """
        super().__init__(name=name, cls_weight=cls_weight, box_weight=box_weight, **kwargs)

    def bind(self, student: nn.Module, teacher: FrozenTeacher) -> None:
        """See :func:`check_dense_heads`."""
        check_dense_heads(student, teacher, method=type(self).__name__)
        self.teacher_taps = list(teacher.model.head_in_features)

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :meth:`Distiller.forward`."""
        ours = dense_predictions(batch.student, student["head"][0].output)
        theirs = dense_predictions(batch.teacher, teacher_dense_outputs(batch.teacher, teacher))
        labels = anchor_labels(batch.student, ours.anchors, batch)
        counts = labels >= 0
        positives = (counts & (labels < ours.logits.shape[2])).sum().clamp(min=1)
        cls = quality_bce(ours.logits, theirs.logits).sum(dim=2)[counts].sum() / positives
        weights = theirs.logits.sigmoid().amax(dim=2) * counts
        boxes = decode(batch.student, ours), decode(batch.teacher, theirs)
        return self._sum(cls, weighted_giou(*boxes, weights) / positives)
