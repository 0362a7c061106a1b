"""COCO data sets of the config: registered, and boxes of zero area left out."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ssim_kd.data import check_datasets, register_coco
from ssim_kd.data.coco import drop_zero_area_boxes, own_json_file, reads_json_file
from tests.data.coco_sets import content, write


def test_register_coco_loads(use):
    use(content())
    register_coco(use(content()))  # once more does no harm
    dicts = DatasetCatalog.get("my_set")
    assert len(dicts) == 3 and len(dicts[0]["annotations"]) == 2
    assert MetadataCatalog.get("my_set").thing_classes == ["class0", "class1"]


def test_register_coco_again_with_other_paths(cfg, tmp_path):
    for number in (2, 5):
        paths = write(tmp_path / str(number), content(num_images=number))
        cfg.DATASETS.REGISTER_COCO = [["my_set", *paths]]
        register_coco(cfg)
        assert len(DatasetCatalog.get("my_set")) == number


def test_register_coco_again_with_other_classes(cfg, tmp_path):
    """The second run of a notebook, after a corrected file."""
    for names in (["cat", "dog"], ["dog", "cat"]):
        data = content()
        for category, name in zip(data["categories"], names, strict=True):
            category["name"] = name
        cfg.DATASETS.REGISTER_COCO = [["my_set", *write(tmp_path / "set", data)]]
        cfg.DATASETS.TRAIN = ("my_set",)
        register_coco(cfg)
        check_datasets(cfg, train=True)
        DatasetCatalog.get("my_set")
        assert MetadataCatalog.get("my_set").thing_classes == names


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([["a", "b"]], r"REGISTER_COCO\[0\] is \['a', 'b'\]: expected \[name, json file"),
        (["abc"], r"REGISTER_COCO\[0\] is 'abc'"),
        ([["a", "b", "c"], ["a", "", "c"]], r"REGISTER_COCO\[1\]"),
        ([["a", "b", "c"], ["a", "x", "c"]], "names 'a' twice"),
        ([["coco_2017_val", "b", "c"]], "'coco_2017_val' is taken"),
    ],
)
def test_register_coco_bad_entry(cfg, entries, message):
    cfg.DATASETS.REGISTER_COCO = entries
    with pytest.raises(ValueError, match=message):
        register_coco(cfg)


def test_own_json_file_ignores_a_conversion_of_detectron2(cfg, tmp_path):
    DatasetCatalog.register("plain", list)
    meta = MetadataCatalog.get("plain")
    assert own_json_file("plain") == ""
    meta.json_file = "/old/run/inference/plain_coco_format.json"
    assert own_json_file("plain") == "" and not reads_json_file("plain")
    json_file, root = write(tmp_path, content())
    register_coco_instances("read_coco_format", {}, json_file, root)
    assert own_json_file("read_coco_format") == json_file and reads_json_file("read_coco_format")


def test_drop_zero_area_boxes_keeps_records_and_crowds(cfg, tmp_path):
    data = content(num_images=2)
    data["annotations"][0].update(bbox=[1, 1, 0, 5], iscrowd=1)
    cfg.DATASETS.REGISTER_COCO = [["my_set", *write(tmp_path / "set", data)]]
    register_coco(cfg)
    records = DatasetCatalog.get("my_set")
    before = json.dumps(records)
    kept = drop_zero_area_boxes(records, drop_emptied=True)
    assert json.dumps(records) == before and kept == records
