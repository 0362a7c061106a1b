"""Maps of single levels, and batches of boxes, for tests of the methods that compare features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

from ssim_kd.modeling import (
    DistillBatch,
    LevelMaps,
    LpDistiller,
    PyramidDistiller,
    SSIMDistiller,
)

D = TypeVar("D", bound=PyramidDistiller)
STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64}
#: Of :func:`features`, which images of 96 x 128 pixels fill; 57 x 100 leave cells of padding.
TWO = {"p3": 8, "p4": 16}
FULL = DistillBatch([(96, 128), (96, 128)])
PADDED = DistillBatch([(96, 128), (57, 100)])


def bind(
    distiller: D, student: int, teacher: int | None = None, levels: Mapping[str, int] | None = None
) -> D:
    """Bind a distiller to a student and a teacher of these channels.

    Args:
        distiller: not bound yet.
        student, teacher: channels; the teacher's are the student's by default.
        levels: strides by level; p3 by default.
    """
    levels = levels or {"p3": 8}
    specs = (
        {level: ShapeSpec(channels=channels, stride=stride) for level, stride in levels.items()}
        for channels in (student, teacher or student)
    )
    distiller.bind_shapes(*specs)
    return distiller


def pyramid(channels: int, size: tuple[int, int], n: int = 2) -> dict[str, torch.Tensor]:
    """Maps of :data:`STRIDES` for images of this size in pixels, with gradients."""
    sizes = {level: tuple(-(-x // stride) for x in size) for level, stride in STRIDES.items()}
    return {k: torch.randn(n, channels, *hw, requires_grad=True) for k, hw in sizes.items()}


def features(*, seed: int, channels: int = 4) -> dict[str, torch.Tensor]:
    """Maps of two levels, the same for one seed."""
    torch.manual_seed(seed)
    maps = pyramid(channels, (96, 128))
    return {level: maps[level].detach() * 3 + 1 for level in TWO}


def make(loss: str = "ssim", **options: Any) -> PyramidDistiller:
    """A bound distiller of the paper's comparison: "ssim", "l1" or "l2"."""
    ssim = loss == "ssim"
    distiller = SSIMDistiller(**options) if ssim else LpDistiller(loss=loss, **options)
    return bind(distiller, 4, levels=TWO)


def frozen(maps: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {level: value.detach().clone() for level, value in maps.items()}


def random_parameters(module: Any) -> Any:
    """The module, none of whose parts is at its start: some begin as 0."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def maps_of(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    level: str = "p3",
) -> LevelMaps:
    """The maps of a level, as :meth:`PyramidDistiller.align` makes them."""
    return LevelMaps(level, student, teacher, mask)


def batch_of(
    boxes: Sequence[Sequence[Sequence[float]]], size: tuple[int, int] = (64, 64), **kwargs: int
) -> DistillBatch:
    """A batch with these ground-truth boxes of each image."""
    instances = []
    for found in boxes:
        image = Instances(size)
        image.gt_boxes = Boxes(torch.tensor(found, dtype=torch.float32).reshape(-1, 4))
        image.gt_classes = torch.zeros(len(found), dtype=torch.int64)
        instances.append(image)
    return DistillBatch([size] * len(instances), instances, **kwargs)
