"""Distillation of a dense head (RetinaNet, FCOS).

The functions are for methods to reuse; the distiller at the end is their plain use. Shapes: N
images, R anchors, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes
from fvcore.nn import giou_loss
from torch import nn
from torch.nn import functional as F

from ..teacher import FrozenTeacher
from .base import DISTILLER_REGISTRY
from .batch import DistillBatch
from .roi_heads import HeadDistiller, check_equal_classes


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
        tensors or Boxes as the detector has them, of any value if the class is not positive.

    Raises:
        ValueError: the batch has no ground truth.
    """
    instances = batch.ground_truth("The loss of a dense head")
    labels, boxes = detector.label_anchors(anchors, instances)
    return torch.stack(list(labels)), list(boxes)


def anchor_normalizer(detector: Any, positive: torch.Tensor) -> Any:
    """The number of positive anchors by which the detector divides its own losses.

    Detectron2's dense detectors keep a running mean of it, ``loss_normalizer``, where papers divide
    by the positives of the batch. With the mean, a batch with few or no positives weighs no more
    than the others; the ratio to the student's own losses stays what the weights say; and processes
    agree as far as their own losses do: their means are of one distribution, their batches differ.

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


@DISTILLER_REGISTRY.register()
class DenseHeadDistiller(HeadDistiller):
    """Dense head against dense head, anchor by anchor.

    :func:`quality_bce` of the class logits over the anchors that are not ignored, and
    :func:`weighted_giou` of the boxes, weighted by the teacher's highest class probability; both
    divided by :func:`anchor_normalizer`.
    """

    student_taps: Sequence[str] = ("head",)

    @configurable
    def __init__(self, *, name: str = "dense_head", **kwargs: Any) -> None:
        """Arguments as of :class:`HeadDistiller`."""
        super().__init__(name=name, **kwargs)

    def bind(self, student: nn.Module, teacher: FrozenTeacher) -> None:
        """See :func:`check_dense_heads`."""
        check_dense_heads(student, teacher, method=type(self).__name__)
        self.teacher_taps = list(teacher.model.head_in_features)

    def parts(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Distiller.parts`."""
        ours = dense_predictions(batch.student, student["head"][0].output)
        theirs = dense_predictions(batch.teacher, teacher_dense_outputs(batch.teacher, teacher))
        labels, _ = anchor_targets(batch.student, ours.anchors, batch)
        counts = labels >= 0
        normalizer = anchor_normalizer(batch.student, counts & (labels < ours.logits.shape[2]))
        cls = quality_bce(ours.logits, theirs.logits).sum(dim=2)[counts].sum()
        weights = theirs.logits.sigmoid().amax(dim=2) * counts
        box = weighted_giou(decode(batch.student, ours), decode(batch.teacher, theirs), weights)
        return {"cls": cls / normalizer, "box": box / normalizer}
