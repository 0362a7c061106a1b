"""CrossKD of R-CNN box heads (Wang et al., CVPR 2024)."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import configurable
from torch import nn

from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    FrozenTeacher,
    RCNNHeadDistiller,
    tappable_levels,
)
from ssim_kd.modeling.adapters import adapt, build_adapters
from ssim_kd.modeling.distillers.roi_heads import proposals, roi_predictions


@DISTILLER_REGISTRY.register()
class CrossKDRCNNDistiller(RCNNHeadDistiller):
    """Predictions of the teacher's box head on the student's maps, against those on its own.

    Both on the proposals that the student trains with. :func:`softmax_kd` of the class logits and
    :func:`top_class_delta_l1` of the box deltas.
    """

    keys = {"adapter": "ADAPTER"}
    defaults = {"part_weights": {"cls": 0.5, "box": 1.0}, "temperature": 3.0, "adapter": "auto"}

    @configurable
    def __init__(self, *, name: str = "crosskd", adapter: str | None = None, **kwargs: Any) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            adapter: of the student's maps, see :func:`build_adapters`; None for "auto".
            kwargs: of :class:`RCNNHeadDistiller`, whose None are the values of the paper.
        """
        super().__init__(name=name, **kwargs)
        self.adapter: Any = adapter
        self.adapters = nn.ModuleDict()

    def bind(self, student: nn.Module, teacher: FrozenTeacher) -> None:
        """Check the heads and build the adapters.

        Raises:
            ValueError: what :func:`check_roi_heads` raises, or the student lacks a level of the
                teacher's box head.
        """
        super().bind(student, teacher)
        ours, theirs = tappable_levels(student), teacher.levels
        unlike = {
            level: (ours[level].stride if level in ours else None, theirs[level].stride)
            for level in self.teacher_taps
            if level not in ours or ours[level].stride != theirs[level].stride
        }
        if unlike:
            raise ValueError(
                "CrossKD gives the student's maps to the teacher's box head, which reads "
                f"{list(self.teacher_taps)}; expected these levels in the student at the same "
                f"strides, found (student, teacher): {unlike}."
            )
        self.student_taps = ("roi_heads.box_pooler", *self.teacher_taps)
        self.adapters = build_adapters(
            self.adapter,
            {level: ours[level] for level in self.teacher_taps},
            {level: theirs[level] for level in self.teacher_taps},
        )

    def student_predictions(
        self, student: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher's box head predicts of the student's maps, with gradient."""
        adapted = {
            level: adapt(self.adapters, level, student[level]) for level in self.teacher_taps
        }
        return roi_predictions(batch.teacher, adapted, proposals(student))
