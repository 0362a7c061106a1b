"""Initialising parts of the student from the teacher: ``MODEL.DISTILL.INIT_FROM_TEACHER``."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.utils.events import get_event_storage
from torch import nn

logger = logging.getLogger(__name__)

KEY = "MODEL.DISTILL.INIT_FROM_TEACHER"
#: "fpn": the backbone without what it stands on; "heads": all that is not the backbone.
PARTS = ("fpn", "heads")


def inherited_keys(student: nn.Module, parts: Sequence[str]) -> list[str]:
    """The names of the student's tensors that belong to some parts.

    Raises:
        ValueError: an unknown part, or one that the student has not.
    """
    names = [name for name in student.state_dict() if not name.endswith("num_batches_tracked")]
    backbone = [name for name in names if name.startswith("backbone.")]
    fpn = [name for name in backbone if not name.startswith("backbone.bottom_up.")]
    found = {
        "fpn": fpn if len(fpn) < len(backbone) else [],
        "heads": [name for name in names if not name.startswith("backbone.")],
    }
    for part in parts:
        if part not in found:
            raise ValueError(f"{KEY} is {list(parts)}; expected some of {list(PARTS)}.")
        if not found[part]:
            raise ValueError(f"{KEY} names {part!r}, but {type(student).__name__} has none.")
    return [name for part in parts for name in found[part]]


def check_inherited(student: nn.Module, teacher: Any, parts: Sequence[str]) -> None:
    """Check that every tensor of the parts has its equal, by name and shape, in the teacher.

    Raises:
        ValueError: it has not; names the first ones.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    unlike = [
        f"{name} {tuple(ours[name].shape)} "
        f"(teacher: {tuple(theirs[name].shape) if name in theirs else 'none'})"
        for name in inherited_keys(student, parts)
        if name not in theirs or theirs[name].shape != ours[name].shape
    ]
    if unlike:
        raise ValueError(
            f"{KEY} is {list(parts)}, but {len(unlike)} tensors of the student have no equal in "
            f"the teacher, e.g. {'; '.join(unlike[:3])}. Expected parts of one architecture, width "
            "and number of classes. Leave out the part that differs."
        )


@torch.no_grad()
def copy_inherited(
    student: nn.Module, tensors: Mapping[str, torch.Tensor], parts: Sequence[str]
) -> None:
    """Copy the parts into the student, and log what was copied.

    Args:
        student: trained from here on.
        tensors: of the teacher, by name.
        parts: of :data:`PARTS`.
    """
    state = student.state_dict()
    names = inherited_keys(student, parts)
    for name in names:
        state[name].copy_(tensors[name])
    logger.info("%s: copied %d tensors of the teacher: %s", KEY, len(names), ", ".join(names))


def inherit_in_training(model: Any, *_args: Any) -> None:
    """As ``inherit``, for a hook of any trainer that takes a model's weights before the first step.

    An average of the weights would begin with those that are replaced. Trainers enter an
    ``EventStorage`` after the start weights are loaded, and before these hooks run.
    """
    if model._inherits and model.training:
        with contextlib.suppress(AssertionError):  # no storage: nothing is trained yet
            model.inherit(get_event_storage().iter)
