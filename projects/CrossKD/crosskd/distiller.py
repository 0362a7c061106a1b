"""CrossKD of dense heads (Wang et al., CVPR 2024), and BCKD (Yang et al., ICCV 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS
from torch import nn

from ssim_kd.losses import channel_moments
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DenseHeadDistiller,
    DistillBatch,
    FrozenTeacher,
    check_number,
)
from ssim_kd.modeling.adapters import adapt, build_adapters
from ssim_kd.modeling.distillers.dense_heads import (
    anchor_normalizer,
    anchor_targets,
    decode,
    dense_predictions,
    quality_bce,
    teacher_dense_outputs,
    weighted_giou,
)

#: Each tower of Detectron2's dense heads, and the layer that predicts from it.
TOWERS = {"cls_subnet": "cls_score", "bbox_subnet": "bbox_pred"}

# Class logits and box deltas, each by level.
Outputs = Sequence[Sequence[torch.Tensor]]


def activation_after(tower: nn.Sequential, depth: int) -> int:
    """The index of the activation after the ``depth``-th convolution of a tower.

    Raises:
        ValueError: the tower has fewer convolutions.
    """
    convs = 0
    for index, layer in enumerate(tower):
        convs += isinstance(layer, nn.Conv2d)
        if convs == depth and isinstance(layer, nn.ReLU):
            return index
    raise ValueError(
        f"depth is {depth}; expected 1 to {convs}, the number of convolutions in the towers of "
        "student and teacher, or 0 (BCKD)."
    )


def match_statistics(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, eps: float = 1e-6
) -> torch.Tensor:
    """The student's map with the mean and the standard deviation of the teacher's channels.

    Args:
        student, teacher: (N, C, H, W), float32.
        mask: (N, H, W) bool, the cells whose moments are taken; None: all.
        eps: added to the student's standard deviation.

    Returns:
        (N, C, H, W). A channel with a deviation of ``eps`` or less becomes the teacher's mean and
        has no gradient, which would be as great as 1 / eps.
    """
    mean, std = channel_moments(student, mask)
    target_mean, target_std = channel_moments(teacher, mask)
    scale = torch.where(std > eps, target_std / (std + eps), 0.0)
    return (student - mean) * scale + target_mean


def weighted_iou(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The sum over boxes of weight (-log IoU), FCOS' loss; IoU is at least 1e-6.

    Args:
        student, teacher: boxes (..., 4) in pixels.
        weights: (...), >= 0.
    """
    corner = torch.minimum(student[..., 2:], teacher[..., 2:])
    overlap = (corner - torch.maximum(student[..., :2], teacher[..., :2])).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (student, teacher)]
    union = areas[0] + areas[1] - overlap
    iou = overlap / union.clamp(min=1e-6)
    return -(iou.clamp(min=1e-6).log() * weights).sum()


@DISTILLER_REGISTRY.register()
class CrossKDDistiller(DenseHeadDistiller):
    """Predictions that the teacher's head makes of the student's features, against the teacher's.

    The student's maps after the ``depth``-th convolution of each tower take on the teacher's
    moments and pass through the rest of the teacher's frozen tower, with gradient. The losses are
    :func:`quality_bce`, and :func:`weighted_giou` weighted by the teacher's highest class
    probability (FCOS: :func:`weighted_iou`); both over the anchors that are not ignored, divided
    by the student's own number of positives.

    Depth 0 compares the student's own predictions, BCKD: boxes are weighted by the highest
    difference of a class probability, over all anchors.

    By default the depth is one convolution less than the towers have (FCOS: half of them), and the
    weights of the two parts are 1 and 1 (FCOS: 0.4 and 0.75; BCKD: 1 and 4), as published.

        CrossKDDistiller()          # CrossKD
        CrossKDDistiller(depth=0)   # BCKD
    """

    keys = {
        "depth": "CROSSKD.DEPTH",
        "positive_levels": "CROSSKD.POSITIVE_LEVELS",
        "adapter": "ADAPTER",
        "mask_padding": "MASK_PADDING",
    }
    defaults = {"adapter": "auto"}

    @configurable
    def __init__(
        self,
        *,
        name: str = "",
        depth: int | None = None,
        positive_levels: bool = False,
        adapter: str | None = None,
        mask_padding: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`; "crosskd", or "bckd" at depth 0, by default.
            depth: convolutions of the student's towers before the teacher's, >= 0.
            positive_levels: whether levels count only if an anchor of them is positive.
            adapter: of the tower's features, see :func:`build_adapters`; None for "auto".
            mask_padding: whether cells in the padding are left out.
            kwargs: of :class:`DenseHeadDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name or ("bckd" if depth == 0 else "crosskd"), **kwargs)
        self.depth = check_number("depth", depth, least=0, whole=True, optional=True)
        self.positive_levels = positive_levels
        self.adapter: Any = adapter
        self.mask_padding = mask_padding
        self.adapters = nn.ModuleDict()

    def own_values(self, student: nn.Module | None) -> dict[str, Any]:
        """See :meth:`Distiller.own_values`; the depth is that of the student's towers."""
        fcos = isinstance(student, FCOS)
        towers: Any = getattr(getattr(student, "head", None), "cls_subnet", ())
        convs = sum(isinstance(layer, nn.Conv2d) for layer in towers)
        weights = {"cls": 0.4, "box": 0.75} if fcos else {"cls": 1.0, "box": 1.0}
        if self.depth == 0:
            weights = {"cls": 1.0, "box": 4.0}
        depth = max(convs // 2 if fcos else convs - 1, 1)
        return {**super().own_values(student), "depth": depth, "part_weights": weights}

    def bind(self, student: Any, teacher: FrozenTeacher) -> None:
        """Check heads and towers, and build the adapters.

        Raises:
            ValueError: what :func:`check_dense_heads` and :func:`activation_after` raise.
        """
        super().bind(student, teacher)
        shapes = student.backbone.output_shape()
        self.strides = [shapes[level].stride for level in student.head_in_features]
        self.is_fcos = isinstance(student, FCOS)
        if not self.depth:
            self.student_taps = ("head",)
            return
        taps, channels = [], []
        for model in (student, teacher.model):
            for tower in TOWERS:
                layers = getattr(model.head, tower, None)
                if not isinstance(layers, nn.Sequential):
                    raise ValueError(
                        f"CrossKD needs towers like those of RetinaNetHead, but "
                        f"{type(model.head).__name__} has no {tower}."
                    )
                index = activation_after(layers, self.depth)
                taps.append(f"head.{tower}.{index}")
                convs = [layer for layer in layers[:index] if isinstance(layer, nn.Conv2d)]
                channels.append(ShapeSpec(channels=convs[-1].out_channels))
        self.student_taps = tuple(taps[:2])
        ours, theirs = (
            dict(zip(TOWERS, pair, strict=True)) for pair in (channels[:2], channels[2:])
        )
        self.adapters = build_adapters(self.adapter, ours, theirs)

    def parts(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Distiller.parts`."""
        detector: Any = batch.teacher
        with torch.autocast(batch.device.type, enabled=False):
            if self.depth:
                maps = [teacher[level].float() for level in self.teacher_taps]
                entering = [[c.inputs[0] for c in student[tap]] for tap in self.student_taps]
                outputs = self._cross(detector.head, entering, maps, batch)
            else:
                outputs = student["head"][0].output[:2], teacher_dense_outputs(detector, teacher)
            # Logits and deltas; student and teacher; by level.
            ours, theirs = zip(
                *[
                    zip(*[crop(*pair) for pair in zip(s, t, strict=True)], strict=True)
                    for s, t in zip(*(x[:2] for x in outputs), strict=True)
                ],
                strict=True,
            )
            return self._losses(ours, theirs, batch)

    def _cross(
        self,
        head: Any,
        entering: Sequence[Sequence[torch.Tensor]],
        maps: Sequence[torch.Tensor],
        batch: DistillBatch,
    ) -> tuple[Outputs, Outputs]:
        """The teacher's head on the student's features, and on the teacher's."""
        crossed: list[Any] = []
        own: list[Any] = []
        for (tower, score), features in zip(TOWERS.items(), entering, strict=True):
            layers = getattr(head, tower)
            index = activation_after(layers, self.depth)
            rest = nn.Sequential(*layers[index:], getattr(head, score))
            # Every level once through each layer, then again: a norm may count the levels.
            with torch.no_grad():
                targets = [layers[:index](x) for x in maps]
                own.append([rest(x) for x in targets])
            aligned = []
            for x, target, stride in zip(features, targets, self.strides, strict=True):
                x, target = crop(adapt(self.adapters, tower, x.float()), target)
                aligned.append(match_statistics(x, target, self._mask(x, stride, batch)))
            crossed.append([rest(x) for x in aligned])
        return (crossed[0], crossed[1]), (own[0], own[1])

    def _mask(self, maps: torch.Tensor, stride: int, batch: DistillBatch) -> torch.Tensor:
        n, _, height, width = maps.shape
        if self.mask_padding:
            return batch.valid_mask(height, width, stride)
        return torch.ones(n, height, width, dtype=torch.bool, device=maps.device)

    def _losses(
        self, ours: Outputs, theirs: Outputs, batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        detector: Any = batch.student
        # The teacher's layers predict for the teacher's anchors.
        predictor = batch.teacher if self.depth else detector
        s, t = dense_predictions(predictor, ours), dense_predictions(batch.teacher, theirs)
        anchors = detector.anchor_generator(list(ours[0]))
        labels, boxes = anchor_targets(detector, anchors, batch)
        masks = [
            self._mask(x, stride, batch).flatten(1).repeat_interleave(a, dim=1)
            for x, stride, a in zip(
                ours[0], self.strides, detector.anchor_generator.num_anchors, strict=True
            )
        ]
        inside = torch.cat(masks, dim=1)
        positive = inside & (labels >= 0) & (labels < detector.num_classes)
        if self.positive_levels:
            levels = positive.split([mask.shape[1] for mask in masks], dim=1)
            found = [level.any().expand_as(level) for level in levels]
            inside = inside & torch.cat(found, dim=1)
        counts = inside & (labels >= 0)
        normalizer = anchor_normalizer(detector, positive)
        cls = (quality_bce(s.logits, t.logits).sum(dim=2) * counts).sum() / normalizer
        probabilities = t.logits.sigmoid()
        if self.depth:
            weights = probabilities.amax(dim=2) * counts
        else:
            weights = (probabilities - s.logits.detach().sigmoid()).abs().amax(dim=2) * inside
        pair = decode(predictor, s), decode(batch.teacher, t)
        if self.is_fcos:
            normalizer = normalizer * _mean_centerness(detector, anchors, boxes, positive)
        box = (weighted_iou if self.is_fcos else weighted_giou)(*pair, weights)
        return {"cls": cls, "box": box / normalizer}


def _mean_centerness(
    detector: Any, anchors: Sequence[Any], boxes: Sequence[Any], positive: torch.Tensor
) -> torch.Tensor:
    """FCOS' target of the positives, their mean; 1 without any."""
    with torch.no_grad():
        centerness = detector.compute_ctrness_targets(list(anchors), list(boxes))
        count = positive.sum()
        mean = torch.where(positive, centerness, 0.0).sum() / count.clamp(min=1)
        return torch.where(count > 0, mean, 1.0)


def crop(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both maps (N, C, H, W) without the padding that only one of them has."""
    height = min(first.shape[-2], second.shape[-2])
    width = min(first.shape[-1], second.shape[-1])
    return first[..., :height, :width], second[..., :height, :width]
