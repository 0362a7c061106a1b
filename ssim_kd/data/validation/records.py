"""Looks for mistakes in the records of a data set that code registers, in Detectron2's format."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ..needs import Needs
from ..records import visible_keypoints
from .annotations import are_numbers, keypoints_fault
from .findings import Findings
from .masks import MALFORMED, NONE, OTHER_SIZE, RLE, SHORT, segmentation_kind

Record = dict[str, Any]


def inspect_records(
    records: Sequence[Record], num_classes: int | None, *, scored: bool, converted: bool
) -> Findings:
    """Inspect what Detectron2 asks for whoever maps the records to the model's input.

    Args:
        records: one an image.
        num_classes: of the set, or else of the student; None: unknown.
        scored: whether COCO's evaluation scores the set.
        converted: whether it is converted to COCO's format for that.

    Returns:
        counts and problems, with the number of the record.
    """
    found = Findings(images=len(records), categories=num_classes or 0)
    wrong: dict[str, list[str]] = {}
    has_annotations = bool(records) and "annotations" in records[0]
    found.scored = has_annotations
    ids: set[Any] = set()
    for i, record in enumerate(records):
        here = f"record {i} ({record.get('file_name', 'no file_name')})"
        if has_annotations and "annotations" not in record:
            wrong.setdefault('have no "annotations", which the first record has', []).append(here)
        if scored:
            _inspect_scored(record, here, ids, wrong, converted=converted)
        annotations = record.get("annotations") or ()
        found.annotations += len(annotations)
        found.empty_images += not annotations
        for k, annotation in enumerate(annotations):
            crowd = annotation.get("iscrowd", 0)
            found.usable += crowd == 0
            category = annotation.get("category_id")
            if crowd not in (0, 1):
                what = '"iscrowd" that is neither 0 nor 1'
            elif crowd and not converted:
                continue
            elif not _is_whole(category):
                what = '"category_id" that is not a whole number'
            elif not 0 <= category < (num_classes or category + 1):
                what = f'"category_id" out of [0, {num_classes})'
            else:
                continue
            wrong.setdefault(f"have a {what}", []).append(
                f"annotation {k} of {here}: {annotation.get('category_id')!r}"
            )
    found.problems += _clauses(wrong)
    return found


def _inspect_scored(
    record: Record, here: str, ids: set[Any], wrong: dict[str, list[str]], *, converted: bool
) -> None:
    keys = ["image_id", *(("file_name", "height", "width") if converted else ())]
    for key in keys:
        if key not in record:
            wrong.setdefault(f'have no "{key}", which COCO\'s evaluation needs', []).append(here)
    if "image_id" in record:
        if record["image_id"] in ids:
            wrong.setdefault('have an "image_id" that appears before', []).append(here)
        ids.add(record["image_id"])
    for k, annotation in enumerate(record.get("annotations") or () if converted else ()):
        fault = box_fault(annotation, arrays=True)
        if not fault:
            size = record.get("height"), record.get("width")
            kind, text = segmentation_kind(annotation.get("segmentation"), *size)
            fault = f'"segmentation" that {text}' if kind in (MALFORMED, SHORT) else ""
        if fault:
            wrong.setdefault(f"have a {fault}", []).append(f"annotation {k} of {here}")


def inspect_for_mapper(records: Sequence[Record], needs: Needs) -> list[str]:
    """Find what Detectron2's DatasetMapper fails at while it trains; a custom mapper may not.

    Returns:
        one clause a kind of fault.
    """
    wrong: dict[str, list[str]] = {}
    for i, record in enumerate(records):
        here = f"record {i} ({record.get('file_name', 'no file_name')})"
        if "file_name" not in record:
            wrong.setdefault('have no "file_name"', []).append(here)
        shape = record.get("height"), record.get("width")
        annotations = record.get("annotations") or ()
        trained = sum(map(visible_keypoints, annotations)) >= needs.least_keypoints
        for k, annotation in enumerate(annotations):
            if annotation.get("iscrowd", 0):
                continue
            fault = box_fault(annotation, arrays=False) or _mask_fault(annotation, shape, needs)
            if not fault and needs.keypoints and trained:
                fault = keypoints_fault(annotation.get("keypoints"), needs.keypoints)
                fault = fault and f'"keypoints" {fault}'
            if fault:
                wrong.setdefault(f"have a {fault}", []).append(f"annotation {k} of {here}")
    return _clauses(wrong)


def box_fault(annotation: dict[str, Any], *, arrays: bool) -> str:
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


def _mask_fault(annotation: dict[str, Any], shape: tuple[Any, Any], needs: Needs) -> str:
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Real) and float(value).is_integer()


def _clauses(wrong: dict[str, list[str]]) -> list[str]:
    return [f"{len(cases)} {what} (for example {cases[0]})" for what, cases in wrong.items()]
