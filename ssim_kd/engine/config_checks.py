"""Values of the config that cannot work: told before anything is built or read."""

import threading

import torch
from detectron2.config import CfgNode

from ..modeling.teacher_config import teacher_config
from .evaluation import check_teachers_classes


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
