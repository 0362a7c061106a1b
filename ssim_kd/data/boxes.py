"""Leaves out boxes of zero area: ``DATASETS.ZERO_AREA_BOXES = "drop"``."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from .annotations import LEAST_SIDE, box_extent

logger = logging.getLogger(__name__)


def drop_zero_area_boxes(
    records: Sequence[dict[str, Any]], *, drop_emptied: bool
) -> list[dict[str, Any]]:
    """Return the records without the boxes that have zero area or lie outside their image.

    Detectron2's mapper leaves such boxes out as well, but only after images without boxes have
    been filtered and classes have been counted. Crowd regions are kept.

    Args:
        records: in Detectron2's format; not changed.
        drop_emptied: also leave out images that lose their last box.
    """
    kept, boxes, images = [], 0, 0
    for record in records:
        empty = _empty_boxes(record)
        if empty.any():
            annotations = [a for a, e in zip(record["annotations"], empty, strict=True) if not e]
            boxes += int(empty.sum())
            if drop_emptied and all(a.get("iscrowd", 0) for a in annotations):
                images += 1
                continue
            record = {**record, "annotations": annotations}
        kept.append(record)
    if boxes:
        logger.warning("Left out %d boxes of zero area, and %d images with them.", boxes, images)
    if not kept:
        raise ValueError("No image is left: every box of the training sets has zero area.")
    return kept


def _empty_boxes(record: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    annotations = record.get("annotations", [])
    if not annotations or "width" not in record or "height" not in record:
        return np.zeros(len(annotations), dtype=bool)
    modes = {a["bbox_mode"] for a in annotations}
    if modes != {BoxMode.XYWH_ABS}:
        return np.zeros(len(annotations), dtype=bool)
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    size = np.array([[record["width"], record["height"]]], dtype=np.float64)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations])
    empty = (box_extent(boxes, np.broadcast_to(size, (len(boxes), 2))) <= LEAST_SIDE).any(axis=1)
    return np.asarray(empty & ~crowd)
