"""What is checked before anything is built: the config's values and the weights to start from."""

import filecmp
import glob
import logging
import os
import threading
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import detection_checkpoint
from detectron2.config import CfgNode

from ..checkpoint import local_file, read_file
from ..modeling.teacher_config import teacher_config
from .evaluation import check_teachers_classes

logger = logging.getLogger(__name__)

_WEIGHTS = "MODEL.WEIGHTS"


def check_config(cfg: CfgNode, *, evaluate: bool) -> None:
    """Check the values whose errors would come late or would not say which key is meant.

    Args:
        cfg: the whole config.
        evaluate: whether it is evaluated with, and nothing is trained.

    Raises:
        ValueError: naming the key, its value and what is expected.
    """
    distill = cfg.MODEL.DISTILL
    name = cfg.MODEL.META_ARCHITECTURE
    if distill.ENABLED and distill.TEACHER.CONFIG_FILE and name != "DistilledDetector":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {name!r}, which learns from no teacher, but "
            "MODEL.DISTILL.TEACHER.CONFIG_FILE names one. Expected 'DistilledDetector', and "
            f"{name!r} as MODEL.DISTILL.STUDENT_META_ARCHITECTURE; or MODEL.DISTILL.ENABLED False."
        )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but no GPU can be used here; expected a "
            "machine with one, or MODEL.DEVICE cpu."
        )
    expected = distill.TEACHER.EXPECTED_AP
    if not 0 <= expected <= 100:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.EXPECTED_AP is {expected}; expected an AP in [0, 100], where 0 "
            "asks for none."
        )
    if evaluate:
        if not cfg.DATASETS.TEST:
            raise ValueError(
                "DATASETS.TEST is (), so that there is nothing to evaluate on; expected at least "
                "one data set name."
            )
        return
    _check_training(cfg)
    if expected and distill.ENABLED and name == "DistilledDetector":
        _check_expected_ap(cfg)


def _check_training(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if solver.CHECKPOINT_PERIOD < 1:
        raise ValueError(
            f"SOLVER.CHECKPOINT_PERIOD is {solver.CHECKPOINT_PERIOD}; expected 1 or more steps. "
            "More than SOLVER.MAX_ITER saves the final checkpoint alone."
        )
    # Longer waits no clock takes; NaN fails as well.
    if not 0 <= solver.GRACE_PERIOD <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"SOLVER.GRACE_PERIOD is {solver.GRACE_PERIOD}; expected seconds, 0 or more."
        )
    if solver.MAX_SKIPPED_STEPS < 0:
        raise ValueError(
            f"SOLVER.MAX_SKIPPED_STEPS is {solver.MAX_SKIPPED_STEPS}; expected 0 (stop at the "
            "first step that is not finite) or more."
        )
    if not cfg.OUTPUT_DIR:
        raise ValueError(
            "OUTPUT_DIR is ''; expected a folder for checkpoints and logs (it is made if missing)."
        )


def _check_expected_ap(cfg: CfgNode) -> None:
    if not cfg.DATASETS.TEST:
        raise ValueError(
            "MODEL.DISTILL.TEACHER.EXPECTED_AP is "
            f"{cfg.MODEL.DISTILL.TEACHER.EXPECTED_AP}, but DATASETS.TEST is (): expected a data "
            "set to evaluate the teacher on, or EXPECTED_AP 0."
        )
    check_teachers_classes(cfg, teacher_config(cfg))


def check_start(cfg: CfgNode, *, resume: bool) -> None:
    """Fetch and read what the student starts from: nothing has been built yet.

    Args:
        cfg: of a training.
        resume: whether a checkpoint is taken instead where there is one.

    Raises:
        ValueError: it is missing, cannot be fetched or cannot be read.
    """
    # Of any kind: which one is whole is the checkpointer's to tell.
    resumes = resume and glob.glob(os.path.join(glob.escape(cfg.OUTPUT_DIR), "model_*.pth"))
    if cfg.MODEL.WEIGHTS and not resumes:
        read_file(_without_options(cfg.MODEL.WEIGHTS), key=_WEIGHTS)


def warn_of_same_weights(cfg: CfgNode) -> None:
    """Warn where the student starts from the teacher's own file, or the teacher is not checked.

    Args:
        cfg: of a training with a teacher whose weights have been loaded.
    """
    path, key = teacher_config(cfg).MODEL.WEIGHTS, "MODEL.DISTILL.TEACHER.WEIGHTS"
    if cfg.MODEL.WEIGHTS:
        start = local_file(_without_options(cfg.MODEL.WEIGHTS), key=_WEIGHTS)
        if filecmp.cmp(start, local_file(path, key=key), shallow=False):
            logger.warning(
                "%s is %r, the same file as %s: the student starts as its own teacher and has "
                "nothing to learn from it. Expected the weights of a better detector.",
                *(key, path, _WEIGHTS),
            )
    if not cfg.MODEL.DISTILL.TEACHER.EXPECTED_AP:
        logger.warning(
            "MODEL.DISTILL.TEACHER.EXPECTED_AP is 0: the quality of the teacher is not checked, "
            "and weights that fit can still be wrong. Set it to evaluate the teacher first."
        )


def _without_options(path: str) -> str:
    """Detectron2 main reads options behind a "?"; to 0.6 they are part of the name."""
    if not hasattr(detection_checkpoint, "parse_qs"):
        return path
    return urlparse(path)._replace(query="").geturl()
