"""The tapped outputs of a training step: checked, and summed to see whether they are finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .taps import level_maps


def check_features(student: nn.Module, distillers: Sequence[Any], ours: Mapping[str, Any]) -> None:
    """Check what a training step has tapped of the student.

    Args:
        student: whose forward has run.
        distillers: with their ``student_taps``.
        ours: the tapped outputs by name.

    Raises:
        ValueError: an output that is missing, or a distiller whose levels have no gradient.
    """
    missing = {name for d in distillers for name in d.student_taps if not len(ours.get(name, ()))}
    if missing:
        raise ValueError(
            f"The forward of the student {type(student).__name__} gives no output of "
            f"{sorted(missing)}: it does not call these modules, or calls .forward() of them, "
            "which skips hooks. Expected module(x), as self.backbone(images.tensor)."
        )
    maps = level_maps(dict(ours)) if torch.is_grad_enabled() else {}
    for d in distillers:
        levels = [name for name in d.student_taps if name in maps]
        if levels and not any(maps[name].requires_grad for name in levels):
            raise ValueError(
                f"The student's features {levels} have no gradient, so that {d.name} would "
                "teach it nothing. Expected levels of which a part is trained "
                "(MODEL.BACKBONE.FREEZE_AT), and no activation checkpointing of the whole "
                "backbone by use_reentrant=True, which hides them from autograd."
            )


def feature_sums(**outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One scalar a level and model, finite if its features are."""
    return {
        f"{whose} features {level}": maps.detach().sum(dtype=torch.float32)
        for whose, found in outputs.items()
        for level, maps in level_maps(found).items()
    }
