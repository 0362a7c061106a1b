"""Random changes of a file in COCO's format: it trains and scores 100, or is refused by name."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssim_kd.config import add_distill_config
from ssim_kd.data import check_datasets, register_coco
from ssim_kd.data import coco as coco_module
from tests.data.coco_sets import content, write
from tests.data.validation.test_coco_file import perfect_ap, train

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

VALUES = st.sampled_from(
    [
        *(0, 1, 2, 5, 7, 96, -1, 0.5, 1.0, 2**31, 2**63, 1e300, float("nan"), float("inf")),
        *("", "1", "abc", "0.png", None, True, False, [], {}, [1], {"a": 1}),
        *([1, 2, 3, 4], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], [[1, 2, 3, 4]], [1, 2, 0, 0]),
        *([[1, 1, 9, 1, 9, 9]], [1, 1, 9, 1, 9, 9], [[1, 1], [9, 1], [9, 9]], [[]]),
        *({"size": [24, 32], "counts": [768]}, {"size": [32, 24], "counts": [768]}),
        *([5, 5, 2], [5, 5], ["5", "5", "2"]),
    ]
)
KEYS = {
    "images": ["id", "file_name", "height", "width", "extra"],
    "annotations": [
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore"),
        *("segmentation", "keypoints", "num_keypoints", "extra"),
    ],
    "categories": ["id", "name", "keypoints", "extra"],
}
changes = st.sampled_from(
    [(table, row, key) for table, keys in KEYS.items() for key in keys for row in (0, 1)]
).flatmap(lambda place: st.tuples(st.just(place), st.one_of(st.just(...), VALUES)))
counts = {"accepted": 0, "refused": 0}


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATASETS.ZERO_AREA_BOXES = "drop"
    cfg.DATASETS.REGISTER_COCO = [["fuzzed", *write(tmp_path, content())]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("fuzzed",)
    logging.disable(logging.WARNING)
    yield cfg
    logging.disable(logging.NOTSET)
    DatasetCatalog.pop("fuzzed", None)
    MetadataCatalog.pop("fuzzed", None)
    coco_module._REGISTERED.pop("fuzzed", None)


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(edits=st.lists(changes, min_size=1, max_size=2))
def check(cfg: Any, tmp_path: Any, edits: list[Any]) -> None:
    data = copy.deepcopy(content())
    for (table, row, key), value in edits:
        if value is ...:
            data[table][row].pop(key, None)
        else:
            data[table][row][key] = copy.deepcopy(value)
    write(tmp_path, data, pictures=False)
    register_coco(cfg)
    try:
        summaries = check_datasets(cfg, train=True)
    except (ValueError, FileNotFoundError) as error:
        counts["refused"] += 1
        named = [key for (_, _, key), _ in edits if key in str(error)]
        assert "data set 'fuzzed'" in str(error) and named, (edits, error)
        return
    try:
        boxes = train(cfg)
    except OSError as error:  # a file name or a size that is not that of the picture
        assert any(key in ("file_name", "width", "height") for (_, _, key), _ in edits), error
        return
    found = summaries[0].findings
    assert found is not None
    learned = sum(map(len, boxes.values()))
    # Of zero area, or left out for its polygons: noted.
    assert found.usable - found.zero_area - len(found.notes) <= learned <= found.usable, edits
    if found.usable and not found.zero_area and learned == found.usable:
        assert perfect_ap(cfg, "fuzzed") == pytest.approx(100), edits
    counts["accepted"] += 1


def test_check_datasets_fuzzed(cfg, tmp_path) -> None:
    check(cfg, tmp_path)
    print(counts)
    assert counts["accepted"] > 50 and counts["refused"] > 50, counts
