"""COCO's AP: by faster-coco-eval if it is installed, else by pycocotools, with the same numbers."""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

logger = logging.getLogger(__name__)

#: Whole numbers below it are exact floats.
EXACT = 2**53


def score(
    truth: COCO,
    found: COCO,
    task: str,
    *,
    limits: Sequence[int] = (1, 10, 100),
    sigmas: Sequence[float] = (),
    images: Sequence[int] | None = None,
) -> COCOeval:
    """Compare detections with the ground truth.

    Args:
        truth: the annotations.
        found: the detections.
        task: "bbox", "segm" or "keypoints".
        limits: detections that count, of an image and class; those of keypoints are COCO's 20.
        sigmas: of the keypoints; empty: COCO's.
        images: ids to which the comparison is limited; None: all.

    Returns:
        accumulated, of which ``summarize()`` prints and sets ``stats``.
    """
    # COCO's own summary is of 100 detections, whatever the limits.
    kind = COCOevalMaxDets if task != "keypoints" and limits[-1] != 100 else COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        scores = kind(truth, found, task)
        if task != "keypoints":
            scores.params.maxDets = list(limits)
        elif len(sigmas):
            scores.params.kpt_oks_sigmas = np.array(sigmas)
        if images is not None:
            scores.params.imgIds = images
        if is_fast(truth):
            scores.eval = _evaluate_fast(truth, found, task, scores.params)
        else:
            scores.evaluate()
            scores.accumulate()
    return scores


def is_fast(truth: COCO) -> bool:
    """Whether faster-coco-eval is installed, and takes the ids of a file: it makes them floats."""
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    ids = (*truth.imgs, *truth.cats, *truth.anns)
    return installed and all(type(i) is int and abs(i) < EXACT for i in ids)


def matches(truth: COCO, found: COCO, *, iou: float, limit: int) -> dict[Any, Any]:
    """The annotation that each detection's box matches, by their ids; crowds are among them.

    Args:
        truth, found: as of :func:`score`.
        iou: least overlap.
        limit: of detections that count, of an image and class.
    """
    fast = is_fast(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        scores = _fast_scores(truth, found, "bbox") if fast else COCOeval(truth, found, "bbox")
        scores.params.maxDets, scores.params.iouThrs = [limit], np.array([iou])
        scores.params.areaRng, scores.params.areaRngLbl = [[0, 1e10]], ["all"]
        scores.evaluate()
    if fast:
        pairs = (pair.split("_") for pair in scores.eval["matched"])
        return {int(detection): int(annotation) for detection, annotation in pairs}
    images = (image for image in scores.evalImgs if image)
    rows = (zip(i["dtIds"], i["dtMatches"][0].tolist(), strict=True) for i in images)
    return {detection: int(match) for row in rows for detection, match in row if match > 0}


def _fast_scores(truth: COCO, found: COCO, task: str) -> Any:
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    def fast(coco: COCO) -> Any:
        other = FastCOCO()
        other.dataset = coco.dataset
        other.createIndex()
        return other

    quiet: dict[str, Any] = {"print_function": logger.debug, "rle_iou_max_workers": 1}
    return COCOeval_faster(fast(truth), fast(found), task, **quiet)


def _evaluate_fast(truth: COCO, found: COCO, task: str, params: Any) -> dict[str, Any]:
    scores = _fast_scores(truth, found, task)
    for key in ("maxDets", "imgIds", "catIds", "iouThrs", "recThrs", "areaRng", "areaRngLbl"):
        setattr(scores.params, key, getattr(params, key))
    if task == "keypoints":
        scores.params.kpt_oks_sigmas = params.kpt_oks_sigmas
    scores.evaluate()
    scores.accumulate()
    return dict(scores.eval)
