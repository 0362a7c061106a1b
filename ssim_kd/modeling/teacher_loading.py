"""Builds the detector that a config names as the teacher, with its weights or without."""

import logging

import torch
from torch import nn

from ..checkpoint import Weights, load_strictly, local_file, read_weights, sha256_of
from .teacher_config import TeacherSource
from .teacher_files import KEY

logger = logging.getLogger(__name__)


def load_detector(source: TeacherSource, *, strict_prefix: str = "") -> tuple[nn.Module, Weights]:
    """Build the whole teacher on the CPU and load its weights.

    Args:
        source: from :func:`teacher_source`.
        strict_prefix: of the keys that must fit; "" for all.

    Raises:
        ValueError: it cannot be built, or what :func:`load_strictly` raises.
    """
    key = "MODEL.DISTILL.TEACHER.WEIGHTS"
    if source.read is not None:
        sha256 = sha256_of(local_file(source.weights, key=key))
        return source.read(), Weights(source.weights, key, {}, "", False, sha256)
    weights = read_weights(source.weights, key=key)
    model = _build(source, "cpu")
    unfit = load_strictly(model, weights, feature_path=strict_prefix)
    if unfit:
        logger.warning(
            "The teacher's heads do not fit its config (%d keys, e.g. %s). Its features fit, and "
            "they alone are used. --eval-teacher would refuse it.",
            len(unfit),
            unfit[0],
        )
    return model, weights


def _build(source: TeacherSource, device: str) -> nn.Module:
    try:
        # The teacher is built when it is first used: what is drawn for its weights, which are then
        # replaced, may not shift the random numbers that the student trains with.
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return source.build(device)
    except Exception as error:
        raise ValueError(
            f"The teacher cannot be built from {KEY} {source.name!r} with its OPTS: "
            f"{type(error).__name__}: {error}"
        ) from error


def build_structure(source: TeacherSource) -> nn.Module:
    """The detector without weights: shapes only where its modules allow that."""
    try:
        with torch.device("meta"):
            return source.build("meta")
    except Exception:
        # A module that computes with its tensors while it is built; a config that cannot be built
        # raises again.
        return _build(source, "cpu")
