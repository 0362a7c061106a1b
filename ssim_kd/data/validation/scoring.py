"""Checks the TEST keys, as COCO's evaluation and ``verify_results`` take them."""

import math
from typing import Any

from ..needs import Needs

# Without TEST.KEYPOINT_OKS_SIGMAS pycocotools takes those of COCO's persons.
COCO_KEYPOINTS = 17
# What Detectron2's evaluators report, and what follows _ after test-time augmentation.
TASKS = ("bbox", "segm", "keypoints", "box_proposals", "sem_seg", "panoptic_seg")


def check_test_keys(needs: Needs) -> None:
    """Check ``TEST.DETECTIONS_PER_IMAGE``, ``KEYPOINT_OKS_SIGMAS`` and ``EXPECTED_RESULTS``.

    Raises:
        ValueError: names the key, its value and what is expected.
    """
    if not needs.test:
        return
    limit = needs.detections_per_image
    if limit < 1:
        raise ValueError(
            f"{needs.key('TEST.DETECTIONS_PER_IMAGE')} is {limit}: expected a number >= 1. COCO's "
            "own is 100."
        )
    if needs.keypoints:
        _check_sigmas(needs)
    _check_expected(needs)


def _check_sigmas(needs: Needs) -> None:
    sigmas, count = needs.oks_sigmas, needs.keypoints
    key = needs.key("TEST.KEYPOINT_OKS_SIGMAS")
    count_key = needs.key("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS")
    if (sigmas or count != COCO_KEYPOINTS) and (
        len(sigmas) != count or not all(s > 0 and math.isfinite(s) for s in sigmas)
    ):
        raise ValueError(
            f"{key} is {sigmas}: expected {count} numbers > 0 ({count_key}), the standard "
            "deviation of each keypoint's annotation over the object's scale. Empty: those of "
            f"COCO's {COCO_KEYPOINTS} of a person."
        )


def _check_expected(needs: Needs) -> None:
    expected, key = needs.expected_results, needs.key("TEST.EXPECTED_RESULTS")
    if expected and len(needs.test) > 1:
        raise ValueError(
            f"{key} is {expected}, but {needs.key('DATASETS.TEST')} has {len(needs.test)} data "
            "sets: Detectron2 compares the results of one. Expected one, or []."
        )
    for row in expected:
        if not _is_expectation(row):
            raise ValueError(
                f"{key} holds {row!r}: expected [task, metric, value, tolerance], "
                f"such as ['bbox', 'AP', 38.5, 0.2], with a task of {', '.join(TASKS)}."
            )


def _is_expectation(row: Any) -> bool:
    if not isinstance(row, list | tuple) or len(row) != 4:
        return False
    task, metric, value, tolerance = row
    texts = isinstance(task, str) and isinstance(metric, str)
    numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in (value, tolerance))
    return texts and numbers and task.removesuffix("_TTA") in TASKS
