"""Levels: which maps of student and teacher are compared."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from .taps import tappable_levels
from .teacher import FrozenTeacher


def match_levels(cfg: CfgNode, student: Any, teacher: FrozenTeacher) -> list[str]:
    """The levels that are compared: ``MODEL.DISTILL.IN_FEATURES``, or every one in common.

    Raises:
        ValueError: a level that student or teacher lacks, or no level in common.
    """
    ours, theirs = tappable_levels(student), teacher.levels
    levels = list(cfg.MODEL.DISTILL.IN_FEATURES)
    for whose, known in (("student", ours), ("teacher", theirs)):
        unknown = [level for level in levels if level not in known]
        if unknown:
            raise ValueError(
                f"MODEL.DISTILL.IN_FEATURES names {unknown}, which the {whose} lacks; it has "
                f"{list(known)}."
            )
    if len(set(levels)) < len(levels):
        raise ValueError(f"MODEL.DISTILL.IN_FEATURES names a level twice: {levels}.")
    if levels:
        return levels
    outputs = student.backbone.output_shape()
    levels = [
        level
        for level, shape in outputs.items()
        if level in theirs and theirs[level].stride == shape.stride
    ]
    if not levels:
        raise ValueError(
            "Student and teacher share no level of equal stride: the student's backbone gives "
            f"{_strides(outputs)}, the teacher has {_strides(theirs)}. Name the levels in "
            "MODEL.DISTILL.IN_FEATURES or choose another teacher."
        )
    return levels


def _strides(shapes: dict[str, ShapeSpec]) -> str:
    return ", ".join(f"{level} (stride {shape.stride})" for level, shape in shapes.items())
