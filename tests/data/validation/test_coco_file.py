"""A file in COCO's format: what is refused, noted, accepted; and what its readers make of it.

Each edit is tried on the consumers as well: Detectron2's reader and mapper, and COCO's evaluation
of detections equal to the ground truth. What the inspection accepts has to train and to score 100;
what it refuses has to fail there, or to be read as something else.
"""

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from ssim_kd.data import build_train_loader
from ssim_kd.data.needs import Needs
from ssim_kd.data.validation.coco_file import inspect_coco
from ssim_kd.engine.evaluation import build_evaluator
from tests.data.coco_sets import content, edited


def inspected(data, needs=Needs(), **options):  # noqa: B008
    return inspect_coco(data, needs, **options)


def train(cfg):
    """The boxes that the mapper gives for each image."""
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (0,), "none"
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 1, 1
    batches = itertools.islice(build_train_loader(cfg), 12)
    return {r["image_id"]: r["instances"].gt_boxes.tensor.tolist() for b in batches for r in b}


def perfect_ap(cfg, name="my_set"):
    """AP of detections that equal the ground truth that is not a crowd."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            rows = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
            boxes = np.array([a["bbox"] for a in rows], dtype=np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            found = Instances((record["height"], record["width"]))
            found.pred_boxes = Boxes(torch.from_numpy(boxes))
            found.scores = torch.full((len(rows),), 0.9)
            found.pred_classes = torch.tensor([a["category_id"] for a in rows]).long()
            evaluator.process([record], [{"instances": found}])
        return evaluator.evaluate()["bbox"]["AP"]


def each(change, *places):
    """An edit of one key of all rows of some tables."""
    return lambda data: [
        row.update({key: change(row[key])}) for table, key in places for row in data[table]
    ]


def first(**changes):
    return lambda data: data["annotations"][0].update(changes)


IDS = ("annotations", "id")
IMAGES = (("images", "id"), ("annotations", "image_id"))
CATEGORIES = (("categories", "id"), ("annotations", "category_id"))
ACCEPTED = {
    "ids from zero": each(lambda i: i - 1, IDS),
    "ids of text": each("ann-{}".format, IDS),
    "ids null": first(id=None),
    "ids negative": each(lambda i: -i, IDS),
    "ids of 64 bits": each(lambda i: i + 2**63 - 2, IDS),
    "image ids of text": each("i{}".format, *IMAGES),
    "image ids of 64 bits": each(lambda i: i + 2**63 - 2, *IMAGES),
    "category ids of text": each("c{}".format, *CATEGORIES),
    "category ids with gaps": each(lambda i: 7 * i, *CATEGORIES),
    "whole floats": each(float, ("images", "id"), ("images", "width"), ("images", "height")),
    "crowd": first(iscrowd=True),
    "orphan": lambda data: data["annotations"].append(
        {**data["annotations"][0], "id": 99, "image_id": 99}
    ),
    "unsorted categories": lambda data: data["categories"].reverse(),
    "empty image": lambda data: data.update(annotations=data["annotations"][2:]),
    "ignore zero": first(ignore=0),
    "partly outside": first(bbox=[-3, -3, 10, 10], area=100),
}


@pytest.mark.parametrize("edit", ACCEPTED)
def test_inspect_coco_accepted_trains_and_scores_100(use, tmp_path, edit):
    data = content()
    ACCEPTED[edit](data)
    found = inspected(data)
    assert (found.problems, found.untrainable, found.unscorable) == ([], [], [])
    cfg = use(data)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    boxes = train(cfg)
    assert len(boxes) == 3
    assert sum(map(len, boxes.values())) == found.usable
    assert perfect_ap(cfg) == pytest.approx(100)


@pytest.mark.parametrize(
    ("edit", "note"),
    [
        ("ids from zero", "id 0 of image 1"),
        ("ids of text", "6 annotations"),
        ("ids null", "id None of image 1"),
        ("orphan", "id 99 of image 99"),
    ],
)
def test_inspect_coco_notes(edit, note):
    data = content()
    ACCEPTED[edit](data)
    (found,) = inspected(data).notes
    assert note in found


def test_inspect_coco_note_of_equal_names():
    data = content()
    data["categories"][1]["name"] = "class0"
    assert "class0" in inspected(data).notes[0]


@pytest.mark.parametrize(("area", "noted"), [(30, 0), (29, 0), (0, 1), (3000, 1), (0.001, 1)])
def test_inspect_coco_note_of_areas(area, noted):
    found = inspected(edited(area=area))
    assert len(found.notes) == noted and found.unscorable == []


REFUSED = [
    ({"image_id": "1"}, "image_id"),
    ({"image_id": None}, "image_id"),
    ({"image_id": ...}, "image_id"),
    ({"category_id": 7}, "category_id"),
    ({"category_id": "1"}, "category_id"),
    ({"category_id": ...}, "category_id"),
    ({"id": 2}, "id"),
    ({"id": [1]}, "id"),
    ({"bbox": [1, 2, 3]}, "bbox"),
    ({"bbox": []}, "bbox"),
    ({"bbox": ...}, "bbox"),
    ({"bbox": None}, "bbox"),
    ({"bbox": "box!"}, "bbox"),
    ({"bbox": ["1", "2", "3", "4"]}, "bbox"),
    ({"bbox": [1, 2, "3", 4]}, "bbox"),
    ({"bbox": [[1, 2, 3, 4]]}, "bbox"),
    ({"bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}, "bbox"),
    ({"bbox": [1, 2, None, 4]}, "bbox"),
    ({"ignore": 1}, "ignore"),
    ({"ignore": None}, "ignore"),
    ({"segmentation": [1, 1, 9, 1, 9, 9]}, "segmentation"),
    ({"segmentation": {"counts": [768]}}, "segmentation"),
    ({"keypoints": ["1", "2", "2"]}, "keypoints"),
]


def changed(change):
    data = content()
    for key, value in change.items():
        data["annotations"][0][key] = value
        if value is ...:
            del data["annotations"][0][key]
    return data


@pytest.mark.parametrize(("change", "key"), REFUSED)
def test_inspect_coco_refused_fails_in_detectron2(use, change, key):
    data = changed(change)
    assert any(
        f'"{key}"' in problem or f"{key}s" in problem for problem in inspected(data).problems
    )
    cfg = use(data)
    # It stops there, or the image is trained on without the box.
    try:
        boxes = train(cfg)
    except Exception:
        return
    assert len(boxes.get(1, ())) < 2


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"bbox": [1, 2, math.nan, 4]}, "bbox"),
        ({"bbox": [1, 2, math.inf, 4]}, "bbox"),
        ({"bbox": [1, 2, -3, 4]}, "bbox"),
        ({"iscrowd": "0"}, "iscrowd"),
        ({"iscrowd": 2}, "iscrowd"),
        ({"iscrowd": None}, "iscrowd"),
        ({"segmentation": "1,1,9,1,9,9"}, "segmentation"),
        ({"segmentation": [[1, 1], [9, 1], [9, 9]]}, "segmentation"),
    ],
)
def test_inspect_coco_refused_that_detectron2_reads_as_something_else(use, change, key):
    data = changed(change)
    (problem,) = inspected(data).problems
    assert f'"{key}"' in problem and "id 1 of image 1" in problem
    assert train(use(data))[1] != [[1, 2, 6, 8], [2, 2, 7, 8]]


def test_inspect_coco_all_of_no_image():
    data = content()
    for annotation in data["annotations"]:
        annotation["image_id"] += 100
    (problem,) = inspected(data).problems
    assert '"image_id"' in problem and "101" in problem


def test_inspect_coco_several_faults():
    data = edited(bbox=[0, 0, -1, 1])
    data["annotations"][1]["iscrowd"] = 5
    assert len(inspected(data).problems) == 2


@pytest.mark.parametrize(
    ("title", "key", "value", "word"),
    [
        ("images", "file_name", 5, "id 2: 5"),
        ("images", "file_name", ..., "number 1"),
        ("images", "id", 1, "1"),
        ("images", "id", "2", "'2'"),
        ("images", "id", None, "None"),
        ("images", "width", 0, "id 2: 0 x 24"),
        ("images", "width", "32", "'32'"),
        ("images", "width", 32.5, "32.5"),
        ("images", "height", None, "None"),
        ("images", "height", math.inf, "inf"),
        ("images", "height", ..., "number 1"),
        ("categories", "name", None, "id 2: None"),
        ("categories", "name", 7, "id 2: 7"),
        ("categories", "id", 1, "1"),
        ("categories", "id", "2", "'2'"),
    ],
)
def test_inspect_coco_images_and_categories(title, key, value, word):
    data = content()
    data[title][1][key] = value
    if value is ...:
        del data[title][1][key]
    (problem,) = inspected(data).problems
    assert f'"{title}"' in problem and key in problem and word in problem


@pytest.mark.parametrize("title", ["images", "annotations", "categories"])
def test_inspect_coco_rows_that_are_no_objects(title):
    data = content()
    data[title][1] = 5
    assert f'"{title}"' in inspected(data).problems[0]


def test_inspect_coco_ground_truth_alone():
    data = content()
    for image in data["images"]:
        del image["file_name"]
    assert inspected(data, read=False).problems == []
    assert inspected(data).problems


def test_inspect_coco_sizes_with_a_point_and_masks():
    data = content()
    ACCEPTED["whole floats"](data)
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    assert inspected(data).unscorable == []
    (sentence,) = inspected(data, Needs(masks=True)).unscorable
    assert "32.0" in sentence


def test_inspect_coco_fractions_of_the_image():
    """As other formats have them: they would be learned as specks in a corner."""
    data = content()
    for annotation in data["annotations"]:
        annotation.update(bbox=[0.25, 0.5, 0.5, 0.25], area=0.125)
    (sentence,) = inspected(data).untrainable
    assert '"bbox"' in sentence and "fractions" in sentence and "0.25" in sentence
    data["annotations"][0]["bbox"] = [0.25, 0.5, 5, 5]
    assert inspected(data).untrainable == []
