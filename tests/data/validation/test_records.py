"""Records of sets that code registers, in Detectron2's format."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from ssim_kd.data.needs import Needs
from ssim_kd.data.validation.records import inspect_records

TRIANGLE = [[1, 1, 9, 1, 9, 9]]
RLE = mask_util.encode(np.ones((24, 32), dtype=np.uint8, order="F"))


def records(**change):
    """Two faultless images; change an annotation of the second, or the image itself."""
    found = [
        {
            "file_name": f"{i}.png",
            "image_id": i,
            "height": 24,
            "width": 32,
            "annotations": [
                {
                    "bbox": [1.0, 2, 5, 6],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": i,
                    "segmentation": TRIANGLE,
                    "keypoints": [5, 5, 2],
                }
            ],
        }
        for i in range(2)
    ]
    for key, value in change.items():
        row = found[1] if key in found[1] else found[1]["annotations"][0]
        row[key] = value
        if value is ...:
            del row[key]
    return found


def test_inspect_records_counts():
    data = records(iscrowd=1)
    data[0]["annotations"] *= 2
    data.append({**data[0], "image_id": "x", "annotations": []})
    found = inspect_records(data, 2, scored=True, converted=True)
    assert found.problems == []
    assert (found.images, found.annotations, found.usable, found.empty_images) == (3, 3, 2, 1)
    assert found.scored


@pytest.mark.parametrize(
    ("change", "scored", "word"),
    [
        ({"category_id": 2}, False, "category_id"),
        ({"category_id": -1}, False, "category_id"),
        ({"category_id": "1"}, False, "category_id"),
        ({"category_id": ...}, False, "category_id"),
        ({"iscrowd": 2}, False, "iscrowd"),
        ({"iscrowd": None}, False, "iscrowd"),
        ({"category_id": 10**400}, False, "category_id"),
        ({"annotations": [None]}, False, "annotations"),
        ({"annotations": 5}, False, "annotations"),
        ({"image_id": [1]}, True, "image_id"),
        ({"annotations": ...}, False, "annotations"),
        ({"image_id": 0}, True, "image_id"),
        ({"image_id": ...}, True, "image_id"),
        ({"file_name": ...}, True, "file_name"),
        ({"width": ...}, True, "width"),
        ({"bbox": [1, 2, 3]}, True, "bbox"),
        ({"bbox_mode": BoxMode.XYWHA_ABS}, True, "bbox_mode"),
        ({"segmentation": np.zeros((24, 32))}, True, "segmentation"),
        ({"segmentation": [[]]}, True, "segmentation"),
    ],
)
def test_inspect_records_one_of_two(change, scored, word):
    found = inspect_records(records(**change), 2, scored=scored, converted=scored)
    (problem,) = found.problems
    assert f'"{word}"' in problem and "record 1" in problem and problem.startswith("1 ")
    if scored:  # which training does not ask for
        assert inspect_records(records(**change), 2).problems == []


@pytest.mark.parametrize(
    "change",
    [
        {"category_id": np.int64(1)},
        {"category_id": 1.0},
        {"bbox": np.array([1, 2, 3, 4])},
        {"segmentation": RLE},
        {"segmentation": [np.array([1, 1, 9, 1, 9, 9])]},
        {"iscrowd": True},
    ],
)
def test_inspect_records_accepted(change):
    assert inspect_records(records(**change), 2, scored=True, converted=True).problems == []


def test_inspect_records_crowds_are_not_learned():
    data = records(iscrowd=1, category_id=9)
    assert inspect_records(data, 2).problems == []
    assert inspect_records(data, 2, scored=True, converted=True).problems


def test_inspect_records_classes_unknown():
    data = records(category_id=99)
    assert inspect_records(data, None).problems == []


def test_inspect_records_without_annotations():
    data = [{"file_name": "a"}, {"file_name": "b"}]
    found = inspect_records(data, 2)
    assert found.problems == [] and not found.scored


def test_inspect_records_that_only_a_custom_mapper_takes():
    paths = ["a.png", "b.png"]
    assert inspect_records(paths, 2).problems == []
    (problem,) = inspect_records(paths, 2, mapped=Needs()).problems
    assert "record 0: 'a.png'" in problem


EVERYTHING = Needs(masks=True, keypoints=1)


def mapped(data, needs=EVERYTHING):
    return inspect_records(data, 2, mapped=needs).problems


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"file_name": ...}, '"file_name"'),
        ({"bbox": ...}, '"bbox"'),
        ({"bbox": [1, 2, float("nan"), 4]}, '"bbox"'),
        ({"bbox_mode": 7}, '"bbox_mode"'),
        ({"segmentation": ...}, "MODEL.MASK_ON"),
        ({"segmentation": [1, 2, 3]}, '"segmentation"'),
        ({"segmentation": np.zeros((24, 32))}, '"segmentation"'),
        ({"segmentation": RLE}, "INPUT.MASK_FORMAT"),
        ({"segmentation": {**RLE, "size": [32, 24]}}, '"size"'),
        ({"keypoints": [5, 5, 2, 9]}, '"keypoints"'),
        ({"keypoints": [5, 5, 2] * 2}, '"keypoints"'),
        ({"keypoints": 5}, '"keypoints"'),
    ],
)
def test_inspect_records_mapped(change, word):
    assert mapped(records()) == []
    (problem,) = mapped(records(**change))
    assert word in problem and "record 1" in problem and problem.startswith("1 ")


@pytest.mark.parametrize(
    "change",
    [{"bbox": ..., "iscrowd": 1}, {"height": ..., "width": ...}, {"bbox_mode": 0}],
)
def test_inspect_records_mapped_accepted(change):
    assert mapped(records(**change)) == []


def test_inspect_records_mapped_boxes_alone():
    assert mapped(records(segmentation=[1, 2], keypoints="x"), Needs()) == []
    assert mapped(records(segmentation=RLE), Needs(masks=True, mask_format="bitmask")) == []


@pytest.mark.parametrize("mode", [BoxMode.XYWH_ABS, BoxMode.XYXY_ABS])
def test_inspect_records_fractions_of_the_image(mode):
    data = records()
    for record in data:
        record["annotations"][0].update(bbox=[0.25, 0.25, 0.5, 0.75], bbox_mode=mode)
    (problem,) = mapped(data, Needs())
    assert '"bbox"' in problem and "fractions" in problem and "0.75" in problem
    assert inspect_records(data, 2).problems == []  # a custom mapper may read them
    data[0]["annotations"][0]["bbox"] = [1, 2, 5, 6]
    assert mapped(data, Needs()) == []
