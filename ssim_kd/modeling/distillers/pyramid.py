"""Distillers of feature maps: what every method shares that compares them level by level."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F

from ..adapters import adapt, build_adapters
from ..taps import tappable_levels
from ..teacher import FrozenTeacher
from .base import DistillBatch, Distiller
from .checks import check_weight

RESIZES = ("error", "bilinear")


class LevelMaps(NamedTuple):
    """The maps of one level, of equal shape: adapted, resized and cropped.

    Attributes:
        level: its name.
        student, teacher: (N, C, H, W).
        mask: (N, H, W) bool, True where a cell counts. Always a tensor.
        padded: whether the mask has any False, known without asking the device.
    """

    level: str
    student: torch.Tensor
    teacher: torch.Tensor
    mask: torch.Tensor
    padded: bool


class PyramidDistiller(Distiller):
    """Compares the maps of student and teacher level by level.

    Does what every such method needs: levels, channel adapters, strides, padding, level weights. A
    method defines :meth:`level_loss`, or :meth:`pyramid_loss` if it treats the levels together, and
    :meth:`build` if it has modules of its own.

        class Cosine(PyramidDistiller):
            def level_loss(self, maps, batch):
                cosine = F.cosine_similarity(maps.student, maps.teacher, dim=1)
                return masked_mean(1 - cosine[:, None], maps.mask)

        DistilledDetector(student=..., teacher=..., distillers=[Cosine(name="cosine")])

    Attributes:
        adapts: False for a method that brings the student's channels to the teacher's by modules of
            its own: it gets the student's maps as they are, and ``adapter`` has no effect.
    """

    adapts: bool = True

    def __init__(
        self,
        *,
        name: str,
        levels: Sequence[str] = (),
        adapter: str = "auto",
        resize: str = "error",
        mask_padding: bool = True,
        level_weights: Sequence[float] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            levels: names; () for every backbone output that both share at the same stride.
            adapter: "auto", "always" or "none"; see :func:`build_adapters`.
            resize: "error" or "bilinear", where strides differ.
            mask_padding: whether cells in the padding are left out.
            level_weights: one a level, or () for 1 each.
            kwargs: of :class:`Distiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        if resize not in RESIZES:
            raise ValueError(f"MODEL.DISTILL.RESIZE is {resize!r}; expected one of {RESIZES}.")
        self.levels = list(levels)
        self.adapter, self.resize, self.mask_padding = adapter, resize, mask_padding
        key = "MODEL.DISTILL.LEVEL_WEIGHTS"
        self.level_weights = [check_weight(key, value) for value in level_weights]
        self.adapters = nn.ModuleDict()
        self.strides: dict[str, int] = {}
        self.teacher_strides: dict[str, int] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments that every such method takes from ``MODEL.DISTILL``."""
        distill = cfg.MODEL.DISTILL
        return {
            **super().from_config(cfg),
            "levels": list(distill.IN_FEATURES),
            "adapter": distill.ADAPTER,
            "resize": distill.RESIZE,
            "mask_padding": distill.MASK_PADDING,
            "level_weights": list(distill.LEVEL_WEIGHTS),
        }

    def bind(self, student: Any, teacher: FrozenTeacher) -> None:
        """Choose the levels, build adapters and the method's own modules.

        Raises:
            ValueError: levels that are not in both, strides or channels that differ.
        """
        ours, theirs = tappable_levels(student), teacher.levels
        if not ours:
            raise ValueError(
                f"The student {type(student).__name__} has no 'backbone' with an output_shape(), "
                "whose levels MODEL.DISTILL compares; expected a detector with a Detectron2 "
                "backbone, or distillers that tap submodules by their path."
            )
        levels = match_levels(self.levels, ours, theirs, student.backbone.output_shape())
        self.bind_shapes({k: ours[k] for k in levels}, {k: theirs[k] for k in levels})

    def bind_shapes(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """As :meth:`bind`, for channels and strides by level, the same levels in both."""
        self.levels = list(student)
        self.student_taps = self.teacher_taps = self.levels
        self.strides = {level: int(shape.stride) for level, shape in student.items()}
        self.teacher_strides = {level: int(shape.stride) for level, shape in teacher.items()}
        self._check_strides()
        self.level_weights = self.level_weights or [1.0] * len(self.levels)
        if len(self.level_weights) != len(self.levels):
            raise ValueError(
                f"MODEL.DISTILL.LEVEL_WEIGHTS has {len(self.level_weights)} weights for the "
                f"{len(self.levels)} levels {self.levels}."
            )
        self.scalar_weights = dict(zip(self.levels, self.level_weights, strict=True))
        if self.adapts:
            self.adapters = build_adapters(self.adapter, student, teacher)
        self.build(student, teacher)

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Build modules of the method's own, as attributes.

        Args:
            student, teacher: channels and stride by level. The maps that the method gets have the
                teacher's channels if it ``adapts``.
        """

    def _check_strides(self) -> None:
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

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            student, teacher: maps (N, C, H, W) by level.
            batch: sizes and ground truth of the images.

        Returns:
            the sum over the levels by ``level_weights``, and the unweighted loss by level.
        """
        maps = [self.align(level, student[level], teacher[level], batch) for level in self.levels]
        total, by_level = self.pyramid_loss(maps, batch)
        return total, dict(zip(self.levels, by_level.detach().unbind(), strict=True))

    def pyramid_loss(
        self, maps: Sequence[LevelMaps], batch: DistillBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss over all levels.

        Returns:
            the sum over the levels by ``level_weights``, and the unweighted losses (L,).
        """
        losses = torch.stack([self.level_loss(level, batch) for level in maps])
        total = sum(w * loss for w, loss in zip(self.level_weights, losses.unbind(), strict=True))
        return torch.as_tensor(total), losses.detach()

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """The loss of one level, a scalar."""
        raise NotImplementedError(
            f"{type(self).__name__} defines neither level_loss nor pyramid_loss."
        )

    def align(
        self, level: str, student: torch.Tensor, teacher: torch.Tensor, batch: DistillBatch
    ) -> LevelMaps:
        """Bring both maps of a level to the same channels and cells, with their mask."""
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
        size = (height, width, self.strides[level])
        padded = self.mask_padding and batch.is_padded(*size)
        if padded:
            mask = batch.valid_mask(*size)
        else:
            shape = (len(student), height, width)
            mask = torch.ones(shape, dtype=torch.bool, device=student.device)
        return LevelMaps(
            level, student[..., :height, :width], teacher[..., :height, :width], mask, padded
        )


def match_levels(
    levels: Sequence[str],
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    outputs: Mapping[str, ShapeSpec],
) -> list[str]:
    """The levels that are compared: those that are named, or every one in common.

    Args:
        levels: ``MODEL.DISTILL.IN_FEATURES``; [] for all in common.
        student, teacher: what can be tapped.
        outputs: of the student's backbone, among which the common ones are looked for.

    Raises:
        ValueError: a level that student or teacher lacks, or no level in common.
    """
    for whose, known in (("student", student), ("teacher", teacher)):
        unknown = [level for level in levels if level not in known]
        if unknown:
            raise ValueError(
                f"MODEL.DISTILL.IN_FEATURES names {unknown}, which the {whose} lacks; it has "
                f"{list(known)}."
            )
    if len(set(levels)) < len(levels):
        raise ValueError(f"MODEL.DISTILL.IN_FEATURES names a level twice: {list(levels)}.")
    common = list(levels) or [
        level
        for level, shape in outputs.items()
        if level in teacher and teacher[level].stride == shape.stride
    ]
    if not common:
        raise ValueError(
            "Student and teacher share no level of equal stride: the student's backbone has "
            f"{_strides(outputs)}, the teacher has {_strides(teacher)}. Name the levels in "
            "MODEL.DISTILL.IN_FEATURES or choose another teacher."
        )
    return common


def _strides(shapes: Mapping[str, ShapeSpec]) -> str:
    return ", ".join(f"{level} (stride {shape.stride})" for level, shape in shapes.items())
