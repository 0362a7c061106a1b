"""Looks for mistakes in the records of a data set that code registers, in Detectron2's format."""

import math
import numbers
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ..needs import Needs
from ..records import Record, visible_keypoints
from .annotations import Annotation, are_numbers, keypoints_fault
from .findings import Findings
from .masks import MALFORMED, NONE, OTHER_SIZE, RLE, SHORT, segmentation_kind


def inspect_records(
    records: Sequence[Record],
    num_classes: int | None,
    *,
    scored: bool = False,
    converted: bool = False,
    mapped: Needs | None = None,
) -> Findings:
    """Inspect what Detectron2 asks for whatever the mapper.

    Args:
        records: one an image.
        num_classes: of the set, or else of the student; None: unknown.
        scored: whether COCO's evaluation scores the set.
        converted: whether it is converted to COCO's format for that.
        mapped: of the student, if Detectron2's DatasetMapper reads them for its training.

    Returns:
        counts and problems, with the number of the record.
    """
    found = Findings(images=len(records), categories=num_classes or 0)
    found.scored = bool(records) and isinstance(records[0], dict) and "annotations" in records[0]
    keys = {"annotations": "which the first record has"} if found.scored else {}
    if mapped is not None:
        keys["file_name"] = "which Detectron2's mapper reads"
    if scored:
        names = ("image_id", *(("file_name", "height", "width") if converted else ()))
        keys |= dict.fromkeys(names, "which COCO's evaluation needs")
    wrong: dict[str, list[str]] = defaultdict(list)
    ids: set[Any] = set()
    largest = 0.0
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            if scored or mapped:  # a custom mapper takes anything
                wrong["are not dictionaries"].append(f"record {i}: {record!r:.80}")
            continue
        here = f"record {i} ({record.get('file_name', 'no file_name')})"
        for key in keys.keys() - record.keys():
            wrong[f'have no "{key}", {keys[key]}'].append(here)
        if scored and "image_id" in record:
            if not isinstance(record["image_id"], int | float | str | np.generic):
                wrong['have an "image_id" that is neither number nor text'].append(here)
                continue
            if record["image_id"] in ids:
                wrong['have an "image_id" that appears before'].append(here)
            ids.add(record["image_id"])
        shape = record.get("height"), record.get("width")
        annotations = record.get("annotations", ())
        if not isinstance(annotations, list | tuple) or not all(
            isinstance(annotation, dict) for annotation in annotations
        ):
            wrong['have "annotations" that are not a list of dictionaries'].append(here)
            continue
        found.annotations += len(annotations)
        found.empty_images += not annotations
        labelled = sum(map(_labelled, annotations)) if mapped and mapped.keypoints else 0
        for k, annotation in enumerate(annotations):
            found.usable += annotation.get("iscrowd", 0) == 0
            what = f"annotation {k} of {here}"
            fault = _class_fault(annotation, num_classes, crowds=converted)
            if fault:
                what += f": {annotation.get('category_id')!r}"
            if not fault and converted:
                fault = _conversion_fault(annotation, shape)
            if not fault and mapped and not annotation.get("iscrowd", 0):
                fault = _mapper_fault(annotation, shape, mapped, labelled)
                largest = max(largest, *annotation["bbox"]) if not fault else largest
            if fault:
                wrong[f"have a {fault}"].append(what)
    found.problems += [
        f"{len(cases)} {what} (for example {cases[0]})" for what, cases in wrong.items()
    ]
    if 0 < largest <= 1:
        found.problems.append(
            f'no "bbox" reaches beyond the first pixel (the largest number is {largest}): are they '
            "fractions of the image? Expected pixels"
        )
    return found


def _labelled(annotation: Annotation) -> int:
    """Labelled keypoints; 1 if they cannot be counted, so that the fault is found."""
    wrong = "keypoints" in annotation and keypoints_fault(annotation["keypoints"], 0)
    return 1 if wrong else visible_keypoints(annotation)


def _class_fault(annotation: Annotation, num_classes: int | None, *, crowds: bool) -> str:
    crowd, category = annotation.get("iscrowd", 0), annotation.get("category_id")
    number: Any = category
    if crowd not in (0, 1):
        return '"iscrowd" that is neither 0 nor 1'
    if crowd and not crowds:
        return ""
    if not isinstance(category, numbers.Real) or category % 1 != 0:
        return '"category_id" that is not a whole number'
    if not 0 <= number < (num_classes or math.inf):
        return f'"category_id" out of [0, {num_classes})'
    return ""


def _conversion_fault(annotation: Annotation, shape: tuple[Any, Any]) -> str:
    kind, text = segmentation_kind(annotation.get("segmentation"), *shape)
    mask = f'"segmentation" that {text}' if kind in (MALFORMED, SHORT) else ""
    return box_fault(annotation, arrays=True) or mask


def _mapper_fault(
    annotation: Annotation, shape: tuple[Any, Any], needs: Needs, labelled: int
) -> str:
    fault = box_fault(annotation, arrays=False) or _mask_fault(annotation, shape, needs)
    if not fault and needs.keypoints and labelled >= needs.least_keypoints:
        fault = keypoints_fault(annotation.get("keypoints"), needs.keypoints)
        fault = fault and f'"keypoints" {fault}'
    return fault


def box_fault(annotation: Annotation, *, arrays: bool) -> str:
    """Return what Detectron2 finds wrong with "bbox" and "bbox_mode"; empty: nothing.

    Args:
        annotation: of a record.
        arrays: whether the box may be an array: its conversion takes one, its mapper does not.
    """
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if arrays and isinstance(box, np.ndarray):
        box = box.tolist()
    if not isinstance(box, list | tuple) or not are_numbers(box):
        return '"bbox" that is not a list of finite numbers'
    modes = [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS]
    if mode not in (modes if len(box) == 4 else [BoxMode.XYWHA_ABS]) or len(box) not in (4, 5):
        return f'"bbox" of {len(box)} numbers with the "bbox_mode" {mode!r}'
    return ""


def _mask_fault(annotation: Annotation, shape: tuple[Any, Any], needs: Needs) -> str:
    if not needs.masks:
        return ""
    kind, fault = segmentation_kind(annotation.get("segmentation"), *shape)
    if kind == NONE:
        return f'"segmentation" that is missing, but {needs.key("MODEL.MASK_ON")} is True'
    if kind in (MALFORMED, SHORT) or (kind == OTHER_SIZE and None not in shape):
        return f'"segmentation" that {fault}'
    if kind in (RLE, OTHER_SIZE) and needs.mask_format == "polygon":
        return (
            '"segmentation" that is a run-length encoding, but '
            f"{needs.key('INPUT.MASK_FORMAT')} is 'polygon': set it to 'bitmask'"
        )
    return ""
