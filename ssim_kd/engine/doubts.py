"""Doubts about a teacher that can be loaded: told before the first step."""

import filecmp
import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode

from ..checkpoint import local_file, read_checkpoint
from ..modeling.teacher import teacher_config
from .start import start_file

logger = logging.getLogger(__name__)


def warn_of_doubts(cfg: CfgNode) -> None:
    """Log what speaks against the teacher of a config, a line each.

    Args:
        cfg: of a training with a teacher whose weights have been loaded.
    """
    path = teacher_config(cfg).MODEL.WEIGHTS
    local = local_file(path, key="MODEL.DISTILL.TEACHER.WEIGHTS")
    found = doubts(read_checkpoint(local))
    start = start_file(cfg)
    if start and filecmp.cmp(start, local, shallow=False):
        found.append(
            f"MODEL.WEIGHTS, {cfg.MODEL.WEIGHTS!r}, is the same file, so that the student starts "
            "as its own teacher and has nothing to learn from it. Expected a better detector's."
        )
    for doubt in found:
        logger.warning("MODEL.DISTILL.TEACHER.WEIGHTS is %r: %s", path, doubt)
    if not cfg.MODEL.DISTILL.TEACHER.EXPECTED_AP:
        logger.warning(
            "How good the teacher is has not been checked: weights that fit can still be wrong. "
            "MODEL.DISTILL.TEACHER.EXPECTED_AP has it evaluated first."
        )


def doubts(checkpoint: Mapping[str, Any]) -> list[str]:
    """What speaks against a checkpoint's being that of a trained teacher.

    Args:
        checkpoint: the dict of a weights file.
    """
    found = []
    if "distiller" in checkpoint:
        found.append("it is the checkpoint of a student that was itself distilled.")
    # Tensors, also out of a .pkl's arrays: NumPy has no bfloat16.
    tensors = {
        name.removeprefix("module."): torch.as_tensor(value)
        for name, value in checkpoint.get("model", checkpoint).items()
        if name.removeprefix("module.").startswith("backbone.")
    }
    means = [value for name, value in tensors.items() if name.endswith(".running_mean")]
    # What Detectron2 starts an FPN with, and training never leaves at 0.
    biases = [value for name, value in tensors.items() if "fpn_" in name and name.endswith(".bias")]
    if means and not any(value.any() for value in means):
        found.append("all running means of its norms are 0, as before any training.")
    if biases and not any(value.any() for value in biases):
        found.append("all biases of its FPN are 0, as before any training.")
    return found
