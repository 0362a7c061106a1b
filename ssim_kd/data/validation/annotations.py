"""Keypoints and flags of annotations, as Detectron2's reader and pycocotools take them."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..needs import Needs
from ..records import visible_keypoints
from .findings import Findings

Annotation = dict[str, Any]

PLAIN = {int, float}


def keypoints_fault(keypoints: Any, count: int) -> str:
    """Return what is wrong with "keypoints"; empty: nothing.

    Args:
        keypoints: ``[x1, y1, v1, x2, ...]`` with v = 0 unlabelled, 1 hidden, 2 visible.
        count: of the keypoints; 0: any.
    """
    if isinstance(keypoints, np.ndarray):
        keypoints = keypoints.tolist()
    if not isinstance(keypoints, list | tuple) or not are_numbers(keypoints):
        return "that is not a list of finite numbers"
    if count and len(keypoints) != 3 * count:
        return f"of {len(keypoints)} numbers, not 3 * {count}"
    return ""


def are_numbers(values: Any) -> bool:
    """Whether all are finite numbers: no text, no None."""
    if not set(map(type, values)) <= PLAIN and not all(
        isinstance(value, numbers.Real) for value in values
    ):
        return False
    return math.isfinite(sum(values))


def name(annotation: Annotation) -> str:
    """Name an annotation in a message."""
    return f"id {annotation['id']} of image {annotation['image_id']}"


def told(pairs: Sequence[tuple[Annotation, str]], what: str, then: str = "") -> list[str]:
    """A text on annotations, each with its fault, that names the first; none without any."""
    if not pairs:
        return []
    first, fault = pairs[0]
    example = f"{name(first)}: {fault}" if fault else name(first)
    return [f"{len(pairs)} annotations {what} (for example {example}){then}"]


def inspect_keypoints(
    found: Findings, annotations: Sequence[Annotation], owners: Sequence[int], needs: Needs
) -> None:
    """Find what is wrong with "keypoints" and "num_keypoints".

    Args:
        found: takes it.
        annotations: each with "id" and "image_id".
        owners: the position of each one's image.
        needs: of the student.
    """
    if not needs.keypoints and not any("keypoints" in a for a in annotations):
        return
    wrong = [
        (a, fault)
        for a in annotations
        if a.get("keypoints") and (fault := keypoints_fault(a["keypoints"], 0))
    ]
    found.problems += told(wrong, 'have unusable "keypoints"')
    if wrong or not needs.keypoints:
        return
    seen = np.zeros(max(owners, default=-1) + 1, dtype=np.int64)
    for annotation, owner in zip(annotations, owners, strict=True):
        seen[owner] += visible_keypoints(annotation)
    advice = f"{needs.key('MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS')} is {needs.keypoints}"
    faults = [keypoints_fault(a.get("keypoints"), needs.keypoints) for a in annotations]
    # Detectron2 leaves out images with fewer keypoints, so that those may lack the key.
    trained = seen >= needs.least_keypoints
    untrained = [
        (a, fault)
        for a, owner, fault in zip(annotations, owners, faults, strict=True)
        if fault and trained[owner] and not a.get("iscrowd", 0)
    ]
    unscored = [(a, fault) for a, fault in zip(annotations, faults, strict=True) if fault]
    for sentences, those in ((found.untrainable, untrained), (found.unscorable, unscored)):
        sentences += told(those, 'have unusable "keypoints"', f", but {advice}.")
    if not trained.any():
        found.untrainable.append(
            f'No image has {needs.least_keypoints} labelled "keypoints" '
            f"({needs.key('MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE')}): none would be "
            "trained on."
        )
    uncounted = [(a, "") for a in annotations if not isinstance(a.get("num_keypoints"), int)]
    advice = ", which COCO's evaluation needs: the number with v > 0."
    found.unscorable += told(uncounted, 'have no "num_keypoints"', advice)
    if not uncounted and not any(a["num_keypoints"] and not a.get("iscrowd") for a in annotations):
        found.unscorable.append('"num_keypoints" is 0 everywhere: the AP would be NaN.')


def inspect_scoring(annotations: Sequence[Annotation]) -> list[str]:
    """Find what keeps boxes from being scored: COCO's evaluation reads two more keys of each.

    Args:
        annotations: each with "id" and "image_id".

    Returns:
        one sentence a key; none if all can be scored.
    """
    problems = []
    for key, advice in (
        ("iscrowd", 'add "iscrowd": 0'),
        ("area", 'add "area" in pixels: width * height, or that of the mask'),
    ):
        wrong = [(a, "") for a in annotations if not isinstance(a.get(key), (int, float))]
        advice = f", which COCO's evaluation needs: {advice}."
        problems += told(wrong, f'have no "{key}" that is a number', advice)
        if key == "area" and not wrong:
            # Out of this range COCO's evaluation ignores the object without a word.
            beyond = [(a, str(a[key])) for a in annotations if not 0 <= a[key] <= 1e10]
            problems += told(beyond, 'have an "area" out of [0, 1e10]', advice)
    if not any(a.get("iscrowd", 0) == 0 for a in annotations):
        problems.append(
            f'All {len(annotations)} annotations are crowds ("iscrowd": 1), which COCO\'s '
            "evaluation ignores: the AP would be NaN."
        )
    return problems
