"""Distillers of feature maps: what every method shares that compares them level by level."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F

from ...ops.options import check_choice, check_number
from ..adapters import adapt, build_adapters
from ..taps import tappable_levels
from ..teacher import FrozenTeacher
from .base import Distiller
from .batch import DistillBatch

RESIZES = ("error", "bilinear")


class LevelMaps(NamedTuple):
    """The maps of one level, of equal shape: adapted, resized and cropped.

    Attributes:
        level: its name.
        student, teacher: (N, C, H, W).
        mask: (N, H, W) bool, True where a cell counts; None: all cells count.
    """

    level: str
    student: torch.Tensor
    teacher: torch.Tensor
    mask: torch.Tensor | None = None


class PyramidDistiller(Distiller):
    """Compares the maps of student and teacher level by level.

    Does what every such method needs: levels, channel adapters, strides, padding, precision, level
    weights. A method defines :meth:`level_loss`, or :meth:`pyramid_loss` if it treats the levels
    together, and :meth:`build` if it has its own modules.

        class Cosine(PyramidDistiller):
            defaults = {"weight": 2.0, "levels": ("p3", "p4", "p5")}

            def level_loss(self, maps, batch):
                cosine = F.cosine_similarity(maps.student, maps.teacher, dim=1)
                return masked_mean(1 - cosine[:, None], maps.mask)

        DistilledDetector(student=..., teacher=..., distillers=[Cosine(name="cosine")])

    Attributes:
        adapts: False for a method that brings the student's channels to the teacher's by its own
            modules: it gets the student's maps as they are, and ``adapter`` has no effect.
        float32: whether the loss gets float32 maps, with autocast off. False: maps of the
            training's precision, and autocast as it is.
    """

    keys = {
        "levels": "IN_FEATURES",
        "adapter": "ADAPTER",
        "resize": "RESIZE",
        "mask_padding": "MASK_PADDING",
        "level_weights": "LEVEL_WEIGHTS",
    }
    defaults = {"levels": (), "adapter": "auto"}
    adapts: bool = True
    float32: bool = True

    def __init__(
        self,
        *,
        name: str,
        levels: Sequence[str] | None = None,
        adapter: str | None = None,
        resize: str = "error",
        mask_padding: bool = True,
        level_weights: Sequence[float] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            levels: names; () for every backbone output that both share at the same stride; None for
                the method's own, as far as both share them.
            adapter: "auto", "always" or "none", see :func:`build_adapters`; None for the method's
                own.
            resize: "error" or "bilinear", if strides differ.
            mask_padding: whether cells in the padding are left out.
            level_weights: one a level, or () for 1 each.
            kwargs: of :class:`Distiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        check_choice("resize", resize, RESIZES)
        self.levels: Any = None if levels is None else list(levels)
        self.adapter: Any = adapter
        self.resize, self.mask_padding = resize, mask_padding
        self.level_weights = [check_number("level_weights", w, least=0) for w in level_weights]
        self.adapters = nn.ModuleDict()
        self.strides: dict[str, int] = {}
        self.teacher_strides: dict[str, int] = {}

    def bind(self, student: Any, teacher: FrozenTeacher) -> None:
        """Choose the levels, build adapters and the method's own modules.

        Raises:
            ValueError: levels that are not in both, strides or channels that differ.
        """
        ours, theirs = tappable_levels(student), teacher.levels
        if not ours:
            raise ValueError(
                f"The student {type(student).__name__} has no 'backbone' with an output_shape(), "
                "whose levels are compared; expected a detector with a Detectron2 backbone, or "
                "distillers that tap submodules by their path."
            )
        self.resolve(student)
        if "levels" in self.own:
            # As far as this pair has them; [] is every level in common.
            self.own["levels"] = self.levels = [
                k
                for k in self.levels
                if k in ours and k in theirs and ours[k].stride == theirs[k].stride
            ]
        levels = match_levels(self.levels, ours, theirs, student.backbone.output_shape())
        self.bind_shapes({k: ours[k] for k in levels}, {k: theirs[k] for k in levels})

    def bind_shapes(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """As :meth:`bind`, for channels and strides by level, the same levels in both."""
        self.resolve()
        self.levels = list(student)
        self.student_taps = self.teacher_taps = self.levels
        self.strides = {level: int(shape.stride) for level, shape in student.items()}
        self.teacher_strides = {level: int(shape.stride) for level, shape in teacher.items()}
        pairs = {k: (stride, self.teacher_strides[k]) for k, stride in self.strides.items()}
        unlike = {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
        if unlike and self.resize == "error":
            raise ValueError(
                f"Strides (student, teacher) differ: {unlike}. Leave these levels out of `levels`, "
                "or set `resize` to 'bilinear'."
            )
        self.level_weights = self.level_weights or [1.0] * len(self.levels)
        if len(self.level_weights) != len(self.levels):
            raise ValueError(
                f"level_weights has {len(self.level_weights)} weights for the "
                f"{len(self.levels)} levels {self.levels}."
            )
        for level, weight in zip(self.levels, self.level_weights, strict=True):
            self.scalar_weights[level] = weight
            for part, of_part in self.part_weights.items():
                self.scalar_weights[f"{level}_{part}"] = weight * of_part
        if self.adapts:
            self.adapters = build_adapters(self.adapter, student, teacher)
        self.build(student, teacher)

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Build the method's own modules, as attributes.

        Args:
            student, teacher: channels and stride by level. The maps that the method gets have the
                teacher's channels if it ``adapts``.
        """

    def one_a_level(self, name: str, default: Sequence[int], given: Sequence[int]) -> list[int]:
        """The values of an argument by level: those that are given, or the first of the default.

        Raises:
            ValueError: as many as levels are expected.
        """
        values = list(given) or list(default)[: len(self.levels)]
        if len(values) != len(self.levels):
            raise ValueError(
                f"{name} has {len(values)} numbers ({values}) for the {len(self.levels)} levels "
                f"{self.levels}; expected one a level."
            )
        return values

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            student, teacher: maps (N, C, H, W) by level.
            batch: sizes and ground truth of the images.

        Returns:
            the sum over levels and parts by their weights; and each unweighted, by the names of
            :meth:`pyramid_loss`.
        """
        maps = [self.align(level, student[level], teacher[level], batch) for level in self.levels]
        autocast: Any = contextlib.nullcontext()
        if self.float32:
            autocast = torch.autocast(maps[0].student.device.type, enabled=False)
        with autocast:
            found = self.pyramid_loss(maps, batch)
        if isinstance(found, Mapping):
            return self.weigh(found)
        total, by_level = found
        return total, dict(zip(self.levels, by_level.detach().unbind(), strict=True))

    def pyramid_loss(
        self, maps: Sequence[LevelMaps], batch: DistillBatch
    ) -> dict[str, torch.Tensor] | tuple[torch.Tensor, torch.Tensor]:
        """The loss over all levels.

        Returns:
            unweighted scalars by name: "{level}", "{level}_{part}" or "{part}"; or the sum over the
            levels by ``level_weights``, and the unweighted losses (L,).
        """
        found: dict[str, torch.Tensor] = {}
        for level in maps:
            loss = self.level_loss(level, batch)
            if isinstance(loss, Mapping):
                found |= {f"{level.level}_{part}": value for part, value in loss.items()}
            else:
                found[level.level] = loss
        return found

    def level_loss(
        self, maps: LevelMaps, batch: DistillBatch
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The loss of one level: a scalar, or scalars by part, weighted by ``part_weights``."""
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
        # Maps of equal strides differ only by the padding at the right and bottom.
        height = min(student.shape[-2], teacher.shape[-2])
        width = min(student.shape[-1], teacher.shape[-1])
        size = (height, width, self.strides[level])
        padded = self.mask_padding and batch.is_padded(*size)
        student, teacher = student[..., :height, :width], teacher[..., :height, :width]
        if self.float32:
            student, teacher = student.float(), teacher.float()
        return LevelMaps(level, student, teacher, batch.valid_mask(*size) if padded else None)


def match_levels(
    levels: Sequence[str],
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    outputs: Mapping[str, ShapeSpec],
) -> list[str]:
    """The levels that are compared: those that are named, or every one in common.

    Args:
        levels: names; [] for all in common.
        student, teacher: what can be tapped.
        outputs: of the student's backbone, among which the common ones are looked for.

    Raises:
        ValueError: a level that student or teacher lacks, or no level in common.
    """
    for whose, known in (("student", student), ("teacher", teacher)):
        unknown = [level for level in levels if level not in known]
        if unknown:
            raise ValueError(
                f"levels names {unknown}, which the {whose} lacks; it has {list(known)}."
            )
    if len(set(levels)) < len(levels):
        raise ValueError(f"levels names a level twice: {list(levels)}.")
    common = list(levels) or [
        level
        for level, shape in outputs.items()
        if level in teacher and teacher[level].stride == shape.stride
    ]
    if not common:
        raise ValueError(
            "Student and teacher share no level of equal stride: the student's backbone has "
            f"{_strides(outputs)}, the teacher has {_strides(teacher)}. Name the levels in "
            "`levels` or choose another teacher."
        )
    return common


def _strides(shapes: Mapping[str, ShapeSpec]) -> str:
    return ", ".join(f"{level} (stride {shape.stride})" for level, shape in shapes.items())
