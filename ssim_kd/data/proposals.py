"""Precomputed proposals of a data set, read without running code of their file."""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..unpickling import read_pickle, reason_of

# Names in files of Detectron1.
_OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}


def add_proposals(records: Sequence[dict[str, Any]], path: str) -> Sequence[dict[str, Any]]:
    """Add proposals to records, as Detectron2's ``load_proposals_into_dataset`` does.

    Args:
        records: of a data set; they are changed.
        path: a .pkl file with the keys "ids", "boxes", "objectness_logits" and, if the boxes are
            not XYXY_ABS, "bbox_mode".

    Raises:
        ValueError: no such file, or it lacks an image; names the file.
    """
    try:
        found = read_pickle(PathManager.get_local_path(os.path.expanduser(path)))
        found = {_OLD_NAMES.get(key, key): value for key, value in found.items()}
        of_image = {str(name): index for index, name in enumerate(found["ids"])}
        boxes, scores = found["boxes"], found["objectness_logits"]
        mode = BoxMode(found.get("bbox_mode", BoxMode.XYXY_ABS))
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as precomputed proposals ({type(error).__name__}: "
            f"{reason_of(error)}); expected a .pkl file with ids, boxes and objectness_logits."
        ) from error
    for record in records:
        index = of_image.get(str(record["image_id"]))
        if index is None or len(boxes[index]) != len(scores[index]):
            raise ValueError(
                f"{path} holds no proposals of the image {record['image_id']!r}, or not as many "
                "boxes as scores; expected those of this data set."
            )
        order = scores[index].argsort()[::-1]
        record["proposal_boxes"] = boxes[index][order]
        record["proposal_objectness_logits"] = scores[index][order]
        record["proposal_bbox_mode"] = mode
    return records
