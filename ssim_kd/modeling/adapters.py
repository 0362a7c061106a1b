"""Adapters: what brings the student's channels to the teacher's (phi of the paper)."""

import torch
from detectron2.layers import ShapeSpec
from fvcore.nn import weight_init
from torch import nn

from ..ops.options import check_choice

ADAPTERS = ("auto", "always", "none")


def build_adapters(
    mode: str, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]
) -> nn.ModuleDict:
    """Make the 1x1 convolutions by level.

    Args:
        mode: "auto": on the levels whose channels differ; "always": on every level; "none": on no
            level.
        student, teacher: channels by level, the same levels in both.

    Returns:
        the adapters by level; a level without one needs none.

    Raises:
        ValueError: an unknown mode, or channels that differ under "none".
    """
    check_choice("adapter", mode, ADAPTERS)
    adapters = nn.ModuleDict()
    for level, shape in student.items():
        channels, target = shape.channels, teacher[level].channels
        if mode == "none" and channels != target:
            raise ValueError(
                f"adapter is 'none', but at level {level} the student has "
                f"{channels} channels and the teacher {target}: set it to 'auto'."
            )
        if mode == "always" or (mode == "auto" and channels != target):
            adapters[level] = nn.Conv2d(channels, target, kernel_size=1)
            weight_init.c2_xavier_fill(adapters[level])
    return adapters


def adapt(adapters: nn.ModuleDict, level: str, features: torch.Tensor) -> torch.Tensor:
    """The student's map (N, C, H, W) of a level with the teacher's number of channels."""
    return adapters[level](features) if level in adapters else features
