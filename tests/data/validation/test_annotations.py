"""Masks and keypoints, next to what Detectron2's reader and pycocotools do with them."""

import contextlib
import io
import json

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as mask_util

from ssim_kd.data.needs import Needs
from ssim_kd.data.validation.annotations import (
    are_numbers,
    inspect_keypoints,
    inspect_scoring,
    keypoints_fault,
)
from ssim_kd.data.validation.findings import Findings
from ssim_kd.data.validation.masks import inspect_masks, segmentation_kind
from tests.data.coco_sets import content

GOOD = [[1, 1, 9, 1, 9, 9]]
MASK = np.zeros((24, 32), dtype=np.uint8, order="F")
MASK[3:9, 4:12] = 1
RLE = mask_util.encode(MASK)
RLE["counts"] = RLE["counts"].decode()
COUNTS = {"size": [24, 32], "counts": [100, 20, 24 * 32 - 120]}

# What Detectron2's reader keeps of an annotation: "all", "box" (no mask), "none", or it "fails".
MASKS = Needs(masks=True)

KINDS = [
    (GOOD, "polygons", "all"),
    ([[1, 1, 9, 1, 9, 9], [2, 2, 4, 2, 4, 4.5]], "polygons", "all"),
    (RLE, "rle", "all"),
    (COUNTS, "rle", "all"),
    (None, "none", "box"),
    ([], "none", "box"),
    ({}, "none", "box"),
    ([[]], "short", "none"),
    ([[1, 2, 3, 4]], "short", "none"),
    ([[1, 1, 9, 1, 9, 9, 4]], "short", "none"),
    ([*GOOD, [1, 2]], "partly", "all"),
    ({**RLE, "size": [32, 24]}, "other size", "all"),
    ({**COUNTS, "size": [32, 24]}, "other size", "all"),
    (GOOD[0], "malformed", "fails"),
    ([[1, 1], [9, 1], [9, 9]], "malformed", "none"),
    ("1,1,9,1,9,9", "malformed", "none"),
    (7, "malformed", "fails"),
    ([{"x": 1, "y": 2}], "malformed", "none"),
    ([["1", "1", "9", "1", "9", "9"]], "malformed", "all"),
    ([[1, 1, 9, 1, 9, None]], "malformed", "all"),
    ([[1, 1, 9, 1, 9, float("inf")]], "malformed", "all"),
    ([[1, 1, 9, 1, 9, 1e9]], "malformed", "all"),
    ({"size": [24, 32]}, "malformed", "fails"),
    ({"counts": [100, 20, 648]}, "malformed", "fails"),
    ({"size": [24, 32], "counts": [100, 20]}, "malformed", "all"),
    ({"size": "24", "counts": RLE["counts"]}, "malformed", "all"),
    ({"size": [24, 32], "counts": ""}, "malformed", "all"),
    ({"size": [24, 32], "counts": RLE["counts"][:-1]}, "malformed", "all"),
    ({"size": [24, 32], "counts": "zzzzzz"}, "malformed", "all"),
    ({"size": [24, 32], "counts": "\xe9"}, "malformed", "all"),
    ({"size": [24, 32], "counts": [100, -20, 688]}, "malformed", "fails"),
    ({"size": [24, 32], "counts": []}, "malformed", "all"),
    ({"size": [24, 32], "counts": [100.5, 20, 647.5]}, "malformed", "all"),
]


@pytest.mark.parametrize(("segmentation", "kind", "read"), KINDS)
def test_segmentation_kind(tmp_path, segmentation, kind, read):
    found, fault = segmentation_kind(segmentation, 24, 32)
    assert found == kind and bool(fault) == (kind not in ("none", "polygons", "rle"))
    # Its word on what Detectron2's reader does is held against that reader.
    data = content(num_images=1, num_classes=1)
    data["annotations"][0]["segmentation"] = segmentation
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    with contextlib.redirect_stdout(io.StringIO()):
        if read == "fails":
            with pytest.raises((TypeError, KeyError, AttributeError, OverflowError)):
                load_coco_json(str(path), "")
            return
        (record,) = load_coco_json(str(path), "")
    kept = "none" if not record["annotations"] else "box"
    if kept == "box" and "segmentation" in record["annotations"][0]:
        kept = "all"
    assert kept == read


def test_segmentation_kind_compressed_at_random():
    random = np.random.default_rng(0)
    for _ in range(50):
        height, width = random.integers(1, 40, 2).tolist()
        mask = random.random((height, width)) < random.choice([0, 0.03, 0.5, 1])
        rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert segmentation_kind(rle, height, width)[0] == "rle"
        assert segmentation_kind({**rle, "counts": rle["counts"].decode()}, height, width)[1] == ""
        other = {**rle, "size": [height + 1, width]}
        assert segmentation_kind(other, height + 1, width)[0] == "malformed"


def annotations(*segmentations, **more):
    return [
        {"id": i + 1, "image_id": 1, "segmentation": s, **more} for i, s in enumerate(segmentations)
    ]


def masks(*segmentations, needs=MASKS, **more):
    rows = annotations(*segmentations, **more)
    found = Findings()
    inspect_masks(found, rows, [(24, 32)] * len(rows), needs)
    return shown(found)


def shown(found):
    lists = {key: value for key, value in vars(found).items() if isinstance(value, list) and value}
    return {key: " ".join(sentences) for key, sentences in lists.items()}


def test_inspect_masks_good():
    assert masks(GOOD, GOOD) == {}
    assert masks(GOOD, RLE, needs=Needs(masks=True, mask_format="bitmask")) == {}
    assert masks(GOOD, RLE, None, needs=Needs()) == {}


def test_inspect_masks_run_lengths_under_polygon():
    found = masks(GOOD, RLE)
    assert list(found) == ["untrainable"]
    assert "INPUT.MASK_FORMAT is 'polygon'" in found["untrainable"]
    assert "1 annotations" in found["untrainable"] and "id 2 of image 1" in found["untrainable"]
    assert masks(RLE, iscrowd=1) == {}  # crowds are not trained on


@pytest.mark.parametrize(
    ("segmentation", "keys"),
    [
        (None, {"untrainable", "unscorable"}),
        ([[1, 2, 3, 4]], {"unscorable", "notes"}),
        ([*GOOD, [1, 2]], {"unscorable", "notes"}),
        ({**RLE, "size": [32, 24]}, {"untrainable", "unscorable"}),
        (GOOD[0], {"problems"}),
    ],
)
def test_inspect_masks_one_of_two(segmentation, keys):
    found = masks(GOOD, segmentation)
    assert set(found) == keys
    assert all("id 2 of image 1" in sentence for sentence in found.values())
    without = masks(GOOD, segmentation, needs=Needs())
    assert set(without) <= {"problems", "notes"}


def test_inspect_masks_all_short():
    """Detectron2 leaves out the boxes as well, whether masks are learned or not."""
    assert "2 annotations are all left out" in masks([[]], [[1, 2]], needs=Needs())["untrainable"]
    assert "untrainable" not in masks([[]], None, needs=Needs())


KEYPOINTS = [5, 5, 2, 9, 5, 1, 7, 9, 0]
THREE = Needs(keypoints=3)


def keypoints(*rows, needs=THREE, owners=None):
    rows = [{"id": i + 1, "image_id": 1, "num_keypoints": 2, **row} for i, row in enumerate(rows)]
    found = Findings()
    inspect_keypoints(found, rows, owners or [0] * len(rows), needs)
    return shown(found)


def test_inspect_keypoints_good():
    good = {"keypoints": KEYPOINTS}
    assert keypoints(good, good) == {}
    assert keypoints({}, good, needs=Needs()) == {}


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({}, {"untrainable", "unscorable"}),
        ({"keypoints": KEYPOINTS[:6]}, {"untrainable", "unscorable"}),
        ({"keypoints": ["5"] * 9}, {"problems"}),
        ({"keypoints": "5,5,2"}, {"problems"}),
        ({"keypoints": KEYPOINTS, "num_keypoints": None}, {"unscorable"}),
        ({"keypoints": KEYPOINTS, "num_keypoints": "2"}, {"unscorable"}),
        ({"iscrowd": 1}, {"unscorable"}),
    ],
)
def test_inspect_keypoints_one_of_two(row, keys):
    found = keypoints({"keypoints": KEYPOINTS}, row)
    assert set(found) == keys
    assert all("id 2 of image 1" in sentence for sentence in found.values())


def test_inspect_keypoints_of_images_that_are_left_out():
    """Detectron2 leaves out images without keypoints, so that those may lack the key."""
    found = keypoints({"keypoints": KEYPOINTS}, {}, owners=[0, 1])
    assert set(found) == {"unscorable"}
    every = keypoints(
        {"keypoints": KEYPOINTS}, {}, owners=[0, 1], needs=Needs(keypoints=3, least_keypoints=0)
    )
    assert set(every) == {"untrainable", "unscorable"}


def test_inspect_keypoints_none_labelled():
    found = keypoints({"keypoints": [0] * 9, "num_keypoints": 0})
    assert "MIN_KEYPOINTS_PER_IMAGE" in found["untrainable"]
    assert "NaN" in found["unscorable"]


def test_keypoints_fault_arrays():
    assert keypoints_fault(np.array(KEYPOINTS), 3) == ""
    assert keypoints_fault(None, 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], True),
        ([1, 2.5, True, np.float32(3)], True),
        ([1, "2"], False),
        ([1, None], False),
        ([float("nan")], False),
        ([[1]], False),
    ],
)
def test_are_numbers(values, expected):
    assert are_numbers(values) is expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iscrowd": None}, ['"iscrowd"', 'add "iscrowd": 0']),
        ({"area": None}, ['"area"', "width * height"]),
        ({"area": "30"}, ['"area"', "number"]),
        ({"area": -1}, ['"area"', "[0, 1e10]", "-1"]),
        ({"area": float("nan")}, ['"area"', "[0, 1e10]", "nan"]),
        ({"area": 2e10}, ['"area"', "[0, 1e10]"]),
    ],
)
def test_inspect_scoring(change, words):
    good = {"id": 1, "image_id": 1, "iscrowd": 0, "area": 30}
    assert inspect_scoring([good]) == []
    (sentence,) = inspect_scoring([good, {**good, "id": 2, **change}])
    assert "1 annotations" in sentence and "id 2 of image 1" in sentence
    assert not [word for word in words if word not in sentence]


def test_inspect_scoring_crowds_alone():
    (sentence,) = inspect_scoring([{"id": 1, "image_id": 1, "iscrowd": 1, "area": 30}])
    assert "iscrowd" in sentence and "NaN" in sentence


@pytest.mark.parametrize("counts", ["o" * 300_000 + "0", "P" * 300_000, ("o" * 20 + "0") * 10])
def test_segmentation_kind_long_runs_are_refused_in_linear_time(counts):
    """A run has 32 bits: reading one of a million took minutes."""
    assert segmentation_kind({"size": [24, 32], "counts": counts}, 24, 32)[0] == "malformed"
