"""Distillers: what makes losses of the features of student and teacher."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn
from torch.nn import functional as F

from .adapters import adapt, build_adapters
from .batch import DistillBatch
from .levels import match_levels
from .taps import tappable_levels
from .teacher import FrozenTeacher

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Registry for distillers: called as ``obj(cfg, student_shapes, teacher_shapes)``, with the
ShapeSpec of every level that is compared, and expected to return a :class:`Distiller`.
"""

RESIZES = ("error", "bilinear")


def build_distiller(cfg: CfgNode, student: nn.Module, teacher: FrozenTeacher) -> "Distiller":
    """Build ``MODEL.DISTILL.NAME`` for the levels that student and teacher share.

    Raises:
        ValueError: an unknown distiller, levels that are not in both, or strides that differ.
    """
    name = cfg.MODEL.DISTILL.NAME
    if name not in DISTILLER_REGISTRY:
        known = sorted(key for key, _ in DISTILLER_REGISTRY)
        raise ValueError(f"MODEL.DISTILL.NAME is {name!r}; expected one of {known}.")
    levels = match_levels(cfg, student, teacher)
    distiller = DISTILLER_REGISTRY.get(name)(
        cfg,
        {level: tappable_levels(student)[level] for level in levels},
        {level: teacher.levels[level] for level in levels},
    )
    teacher.tap(levels)
    return distiller


def _weights(key: str, values: Iterable[Any]) -> list[float]:
    values = list(values)
    if not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(f"MODEL.DISTILL.{key} is {values}; expected finite numbers of 0 or more.")
    return [float(value) for value in values]


class Distiller(nn.Module):
    """What every method shares: levels, adapters, alignment, weights and what is logged.

    A method derives from it and defines :meth:`level_loss`, or :meth:`pyramid_loss` where it
    treats the levels together.
    """

    #: Name under which the values by level are logged.
    loss_name = "loss"

    @configurable
    def __init__(
        self,
        *,
        student_shapes: dict[str, ShapeSpec],
        teacher_shapes: dict[str, ShapeSpec],
        adapter: str = "auto",
        resize: str = "error",
        mask_padding: bool = True,
        level_weights: tuple[float, ...] = (),
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            student_shapes, teacher_shapes: channels and stride by level, the same levels in both.
            adapter: see :func:`build_adapters`.
            resize: "error" or "bilinear", where strides differ.
            mask_padding: whether cells in the padding are left out.
            level_weights: one a level, or () for 1 each.
            loss_weight: of the sum over the levels (lambda in the paper).

        Raises:
            ValueError: a value out of its range, or strides that differ under "error".
        """
        super().__init__()
        self.levels = list(student_shapes)
        self.strides = {level: int(shape.stride) for level, shape in student_shapes.items()}
        self.teacher_strides = {level: int(s.stride) for level, s in teacher_shapes.items()}
        self.adapters = build_adapters(adapter, student_shapes, teacher_shapes)
        self.resize = resize
        self.mask_padding = mask_padding
        self.level_weights = _weights("LEVEL_WEIGHTS", level_weights) or [1.0] * len(self.levels)
        (self.loss_weight,) = _weights("LOSS_WEIGHT", [loss_weight])
        self.metrics: dict[str, torch.Tensor] = {}
        self._check()

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student_shapes: dict[str, ShapeSpec],
        teacher_shapes: dict[str, ShapeSpec],
    ) -> dict[str, Any]:
        """The arguments that every method takes from ``MODEL.DISTILL``."""
        distill = cfg.MODEL.DISTILL
        return {
            "student_shapes": student_shapes,
            "teacher_shapes": teacher_shapes,
            "adapter": distill.ADAPTER,
            "resize": distill.RESIZE,
            "mask_padding": distill.MASK_PADDING,
            "level_weights": tuple(distill.LEVEL_WEIGHTS),
            "loss_weight": distill.LOSS_WEIGHT,
        }

    def _check(self) -> None:
        if self.resize not in RESIZES:
            raise ValueError(f"MODEL.DISTILL.RESIZE is {self.resize!r}; expected one of {RESIZES}.")
        unlike = {
            level: (stride, self.teacher_strides[level])
            for level, stride in self.strides.items()
            if stride != self.teacher_strides[level]
        }
        if unlike and self.resize == "error":
            raise ValueError(
                f"Strides (student, teacher) differ: {unlike}. Leave these levels out of "
                "MODEL.DISTILL.IN_FEATURES, or set MODEL.DISTILL.RESIZE to 'bilinear'."
            )
        if len(self.level_weights) != len(self.levels):
            raise ValueError(
                f"MODEL.DISTILL.LEVEL_WEIGHTS has {len(self.level_weights)} weights for the "
                f"{len(self.levels)} levels {self.levels}."
            )

    def forward(
        self,
        student_features: dict[str, torch.Tensor],
        teacher_features: dict[str, torch.Tensor],
        batch: DistillBatch,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            student_features, teacher_features: maps (N, C, H, W) by level.
            batch: sizes and ground truth of the images.

        Returns:
            {"loss_distill": the weighted sum over the levels}. :attr:`metrics` then holds
            ``distill/{loss_name}_{level}``, raw, and the same with ``_weighted``.
        """
        pairs = [
            self.align(level, student_features[level], teacher_features[level])
            for level in self.levels
        ]
        students = [student for student, _ in pairs]
        teachers = [teacher for _, teacher in pairs]
        masks: list[torch.Tensor | None] = [None] * len(pairs)
        if self.mask_padding:
            masks = [
                batch.valid_mask(student.shape[-2], student.shape[-1], self.strides[level])
                for level, student in zip(self.levels, students, strict=True)
            ]
        total, by_level = self.pyramid_loss(students, teachers, masks)
        self._log(by_level)
        return {"loss_distill": self.loss_weight * total}

    def pyramid_loss(
        self,
        students: list[torch.Tensor],
        teachers: list[torch.Tensor],
        masks: list[torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss over all levels.

        Args:
            students, teachers: L maps (N, C, H, W) of equal shapes.
            masks: (N, H, W) bool, True where a cell is valid; None where all are.

        Returns:
            the sum over the levels by ``level_weights``, and the raw losses (L,).
        """
        losses = torch.stack(
            [
                self.level_loss(student, teacher, mask)
                for student, teacher, mask in zip(students, teachers, masks, strict=True)
            ]
        )
        total = sum(w * loss for w, loss in zip(self.level_weights, losses.unbind(), strict=True))
        return torch.as_tensor(total), losses.detach()

    def level_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of one level, a scalar; arguments as in :meth:`pyramid_loss`."""
        raise NotImplementedError(
            f"{type(self).__name__} defines neither level_loss nor pyramid_loss."
        )

    def align(
        self, level: str, student: torch.Tensor, teacher: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring both maps of a level to the same channels and cells."""
        student = adapt(self.adapters, level, student)
        ratio = self.teacher_strides[level] / self.strides[level]
        if ratio < 1:
            # Whole blocks of cells: what is left at the right and bottom would be dropped.
            block = round(1 / ratio)
            rest = (0, -teacher.shape[-1] % block, 0, -teacher.shape[-2] % block)
            teacher = F.pad(teacher, rest, mode="replicate")
        if ratio != 1:
            teacher = F.interpolate(
                teacher, scale_factor=ratio, mode="bilinear", align_corners=False
            )
        # Of equal strides, maps differ by the padding at the right and bottom alone.
        height = min(student.shape[-2], teacher.shape[-2])
        width = min(student.shape[-1], teacher.shape[-1])
        return student[..., :height, :width], teacher[..., :height, :width]

    def _log(self, by_level: torch.Tensor) -> None:
        self.metrics = {}
        for level, weight, value in zip(
            self.levels, self.level_weights, by_level.unbind(), strict=True
        ):
            name = f"distill/{self.loss_name}_{level}"
            self.metrics[name] = value
            self.metrics[f"{name}_weighted"] = value * (self.loss_weight * weight)
