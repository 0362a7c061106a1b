"""What goes wrong in a detector's boxes: kinds of errors and what each costs, and COCO's AP.

The kinds and thresholds are those of Bolya et al., *TIDE: A General Toolbox for Identifying Object
Detection Errors*, ECCV 2020, section 2; the matching is COCO's.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO

from ..data import coco_scores

#: Kinds of errors, and what each means.
KINDS = {
    "localisation": "right class, overlap (IoU) from 0.1 to 0.5 with a box of that class",
    "classification": "IoU of 0.5 or more with a box of another class",
    "both": "wrong class, and IoU from 0.1 to 0.5",
    "duplicate": "right class and place, but another detection with a higher score took the box",
    "background": "IoU below 0.1 with every box",
    "missed": "a box that no detection finds, not even one with an error of the first two kinds",
}
CORRECT, IGNORED = "correct", "ignored"
#: IoU of a correct box, and below which a detection is on the background.
FOREGROUND, BACKGROUND = 0.5, 0.1
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass
class ErrorAnalysis:
    """Errors of a detector on a set.

    Attributes:
        ap50: box AP at IoU 0.5, 0 to 100; NaN without ground truth.
        counts: of errors, by kind.
        costs: AP50 that the set would gain if only the errors of a kind were mended.
        kinds: of each detection, by its id: :data:`CORRECT`, :data:`IGNORED` (in a crowd), a kind.
        matches: the box of the ground truth, by the id of a correct detection.
    """

    ap50: float
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    costs: dict[str, float] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    matches: dict[int, int] = field(default_factory=dict)


@dataclass
class _Detections:
    """Those that count, in the order of COCO's evaluation."""

    ids: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)


def evaluate_boxes(truth: COCO, found: COCO, *, limit: int = 100) -> dict[str, float]:
    """COCO's box AP, 0 to 100, under the names of Detectron2.

    Args:
        truth: the annotations.
        found: the detections.
        limit: of detections that count, of an image and class.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl", and "AP-NAME" of each class; NaN if the set
        has no such box.
    """
    evaluation = coco_scores.score(truth, found, "bbox", limits=[limit])
    precision = evaluation.eval["precision"][..., -1]  # IoU, recall, class, size

    def mean(values: NDArray[np.float64]) -> float:
        known = values[values > -1]
        return 100 * float(known.mean()) if known.size else float("nan")

    ap = {"AP": mean(precision[..., 0])}
    ap |= {"AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    ap |= {f"AP{size}": mean(precision[..., i]) for i, size in enumerate("sml", start=1)}
    names = {c["id"]: str(c["name"]) for c in truth.dataset["categories"]}
    for place, category in enumerate(evaluation.params.catIds):
        ap[f"AP-{names[category]}"] = mean(precision[:, :, place, 0])
    return ap


def analyse(truth: COCO, found: COCO, *, limit: int = 100) -> ErrorAnalysis:
    """Find the kind of every error, and what AP50 would be without each.

    Args:
        truth, found, limit: as in :func:`evaluate_boxes`. Crowds match nothing; a detection inside
            one is ignored, as in COCO's AP.
    """
    result = ErrorAnalysis(float("nan"))
    dets = _Detections()
    counted = Counter(a["category_id"] for a in truth.anns.values() if not _is_ignored(a))
    boxes = {category: counted[category] for category in truth.cats}
    matched = coco_scores.matches(truth, found, iou=FOREGROUND, limit=limit)
    groups: dict[tuple[Any, Any], list[Any]] = defaultdict(list)
    for detection in found.anns.values():
        groups[detection["category_id"], detection["image_id"]].append(detection)
    for (category, _), rows in sorted(groups.items()):
        for row in sorted(rows, key=lambda d: -float(d["score"]))[:limit]:
            number, match = row["id"], matched.get(row["id"])
            if _is_ignored(row if match is None else truth.anns[match]):
                result.kinds[number] = IGNORED
                continue
            dets.ids.append(number)
            dets.classes.append(category)
            dets.scores.append(row["score"])
            dets.correct.append(match is not None)
            if match is not None:
                result.kinds[number], result.matches[number] = CORRECT, match
    taken = set(result.matches.values())
    targets = _classify(truth, found, result, dets, taken)
    _count(result, dets, boxes, targets, truth, taken)
    return result


def _classify(
    truth: COCO, found: COCO, result: ErrorAnalysis, dets: _Detections, taken: set[int]
) -> dict[int, list[tuple[float, int]]]:
    """Set the kind of each false positive.

    Returns:
        by box that nothing matches, the detections that would find it if they were mended: pairs of
        negative score and id.
    """
    by_image: dict[int, list[int]] = {}
    for number, correct in zip(dets.ids, dets.correct, strict=True):
        if not correct:
            by_image.setdefault(found.anns[number]["image_id"], []).append(number)
    targets: dict[int, list[tuple[float, int]]] = {}
    for image, numbers in by_image.items():
        there = [a for a in truth.imgToAnns.get(image, []) if not a["iscrowd"]]
        if not there:
            result.kinds.update(dict.fromkeys(numbers, "background"))
            continue
        wrong = [found.anns[number] for number in numbers]
        overlaps = np.asarray(
            mask.iou([d["bbox"] for d in wrong], [a["bbox"] for a in there], [0] * len(there))
        )
        same = np.array([[d["category_id"] == a["category_id"] for a in there] for d in wrong])
        right, other = np.where(same, overlaps, 0.0), np.where(same, 0.0, overlaps)
        for row, number in enumerate(numbers):
            best, best_other = right[row].max(), other[row].max()
            place = None
            if BACKGROUND <= best < FOREGROUND:
                kind, place = "localisation", int(right[row].argmax())
            elif best_other >= FOREGROUND:
                kind, place = "classification", int(other[row].argmax())
            elif best >= FOREGROUND:
                kind = "duplicate"
            else:
                kind = "both" if best_other > BACKGROUND else "background"
            result.kinds[number] = kind
            if place is not None and there[place]["id"] not in taken:
                score = -float(found.anns[number]["score"])
                targets.setdefault(there[place]["id"], []).append((score, number))
    return targets


def _count(
    result: ErrorAnalysis,
    dets: _Detections,
    boxes: Mapping[int, int],
    targets: Mapping[int, list[tuple[float, int]]],
    truth: COCO,
    taken: set[int],
) -> None:
    """Count the errors, and mend each kind separately."""
    counted = [a for a in truth.anns.values() if not a["iscrowd"]]
    missed = [a for a in counted if a["id"] not in taken and a["id"] not in targets]
    kinds = np.array([result.kinds[number] for number in dets.ids], dtype=object)
    for kind in KINDS:
        result.counts[kind] = int((kinds == kind).sum())
    result.counts["missed"] = len(missed)
    classes, scores = np.array(dets.classes, dtype=int), np.array(dets.scores, dtype=float)
    correct = np.array(dets.correct, dtype=bool)
    result.ap50 = _ap50(classes, scores, correct, boxes)
    # A box is found once: by the detection with the highest score of those that aim at it.
    place_of = {number: place for place, number in enumerate(dets.ids)}
    mended = {place_of[min(aims)[1]]: box for box, aims in targets.items()}
    for kind in KINDS:
        new_classes, new_correct, left = classes.copy(), correct.copy(), dict(boxes)
        kept = kinds != kind
        if kind == "missed":
            for annotation in missed:
                left[annotation["category_id"]] -= 1
        for place, box in mended.items():
            if kinds[place] == kind:
                kept[place] = new_correct[place] = True
                new_classes[place] = truth.anns[box]["category_id"]
        ap50 = _ap50(new_classes[kept], scores[kept], new_correct[kept], left)
        result.costs[kind] = ap50 - result.ap50


def _ap50(
    classes: NDArray[np.int64],
    scores: NDArray[np.float64],
    correct: NDArray[np.bool_],
    boxes: Mapping[int, int],
) -> float:
    """COCO's AP at one IoU, 0 to 100: the mean over the classes that have boxes."""
    found = []
    for category, count in boxes.items():
        if count <= 0:
            continue
        chosen = np.flatnonzero(classes == category)
        order = chosen[np.argsort(-scores[chosen], kind="mergesort")]
        hits = np.cumsum(correct[order])
        precision = hits / np.arange(1, len(order) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(hits / count, _RECALLS, side="left")
        found.append(np.append(precision, 0.0)[places].mean())
    return 100 * float(np.mean(found)) if found else float("nan")


def _is_ignored(box: dict[str, Any]) -> bool:
    """Whether COCO's AP counts a box neither as found nor as missed."""
    return bool(box["iscrowd"]) or not 0 <= box["area"] <= 1e10
