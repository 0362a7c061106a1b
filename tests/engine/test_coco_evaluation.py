"""What reaches COCO's evaluation: AP of detections that equal the ground truth is 100."""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from ssim_kd.config import add_distill_config
from ssim_kd.engine.evaluation import build_evaluator


@pytest.fixture
def cfg(tmp_path):
    before = set(DatasetCatalog)
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    yield cfg
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


def objects(count, first_id=1, keypoints=()):
    """Records of one image with so many objects, and the same in COCO's format."""
    boxes = [[i % 15 * 30, i // 15 * 30, 20, 20] for i in range(count)]
    annotations = [
        {"id": first_id + i, "image_id": 1, "category_id": 1, "bbox": box, "area": 400}
        for i, box in enumerate(boxes)
    ]
    for annotation in annotations:
        annotation["iscrowd"] = 0
        if keypoints:
            x, y = annotation["bbox"][:2]
            annotation["keypoints"] = [v for dx, dy in keypoints for v in (x + dx, y + dy, 2)]
            annotation["num_keypoints"] = len(keypoints)
    image = {"id": 1, "file_name": "0.png", "height": 480, "width": 480}
    return {
        "images": [image],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }


def register(name, content, folder: Path):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    register_coco_instances(name, {}, str(path), str(folder))


def by_code(name, count):
    boxes = [a["bbox"] for a in objects(count)["annotations"]]
    records = [
        {
            "file_name": "0.png",
            "image_id": 1,
            "height": 480,
            "width": 480,
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} for box in boxes
            ],
        }
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    return records


def score(cfg, name, *, keypoints=0.0, shown=None):
    """Results of perfect detections; keypoints are off by so many pixels."""
    (record,) = DatasetCatalog.get(name)
    rows = record["annotations"][:shown]
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((480, 480))
    found.pred_boxes, found.scores = Boxes(boxes), torch.full((len(rows),), 0.9)
    found.pred_classes = torch.zeros(len(rows), dtype=torch.long)
    if any("keypoints" in row for row in rows):
        found.pred_keypoints = torch.tensor([row["keypoints"] for row in rows]).reshape(
            len(rows), -1, 3
        )
        found.pred_keypoints[..., 0] += keypoints
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        evaluator.process([record], [{"instances": found}])
        return evaluator.evaluate()


@pytest.mark.parametrize(("limit", "expected"), [(300, 100.0), (150, 100.0), (100, 66.3)])
def test_build_evaluator_more_than_100_detections(cfg, tmp_path, limit, expected):
    register("crowded", objects(150), tmp_path)
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    results = score(cfg, "crowded")["bbox"]
    # 100 of 150 found: precision is 1 up to a recall of 2/3, of which 67 of 101 points are.
    assert results["AP"] == pytest.approx(expected, abs=0.05)
    assert results["AP50"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("limit", [1, 30, 100])
def test_build_evaluator_up_to_100_detections_is_cocos(cfg, tmp_path, limit):
    register("few", objects(5), tmp_path)
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    assert score(cfg, "few")["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("fast", [False, True])
def test_build_evaluator_no_detections_are_0_ap(cfg, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("ssim_kd.engine.coco_evaluation.is_fast", lambda _: fast)
    register("missed", objects(5), tmp_path)
    found = score(cfg, "missed", shown=0)["bbox"]
    # Boxes of 20 x 20 pixels are small; there are none of another size.
    assert [found.get(name) for name in ("AP", "AP50", "AP75", "APs")] == [0] * 4
    assert math.isnan(found["APm"]) and math.isnan(found["APl"])


@pytest.mark.parametrize("ids", [range(0, 4), [0] * 4, ["a", "b", "c", "d"], [None, 1, 2.5, -1]])
def test_build_evaluator_annotation_ids(cfg, tmp_path, ids):
    data = objects(4)
    for annotation, number in zip(data["annotations"], ids, strict=True):
        annotation["id"] = number
    register("ids_minival", data, tmp_path)  # a name whose equal ids Detectron2 admits
    assert score(cfg, "ids_minival")["bbox"]["AP"] == pytest.approx(100)


def test_build_evaluator_annotation_id_zero_in_detectron2(cfg, tmp_path):
    """What the class is for: Detectron2's own evaluator counts the match as none."""
    register("zero", objects(4, first_id=0), tmp_path)
    (record,) = DatasetCatalog.get("zero")
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((480, 480), pred_boxes=Boxes(boxes), scores=torch.full((4,), 0.9))
    found.pred_classes = torch.zeros(4, dtype=torch.long)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOEvaluator("zero", output_dir=str(tmp_path))
        evaluator.reset()
        evaluator.process([record], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP"] < 80


def test_build_evaluator_keypoint_sigmas(cfg, tmp_path):
    """OKS = exp(-d² / (2 (2 sigma)² area)); with d = 5 and area 400 it is 0.5 at sigma 0.1061."""
    register("points", objects(4, keypoints=[(5, 5), (15, 5), (10, 15)]), tmp_path)
    results = {}
    for sigma in (0.100, 0.112):
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [sigma] * 3
        results[sigma] = score(cfg, "points", keypoints=5.0)["keypoints"]["AP50"]
    assert results == {0.100: pytest.approx(0), 0.112: pytest.approx(100)}


def test_build_evaluator_records_of_code_converted_each_time(cfg, tmp_path):
    records = by_code("mine", 4)
    assert score(cfg, "mine")["bbox"]["AP"] == pytest.approx(100)
    # A second run of the process, on records that have changed, in the same folder.
    records[0]["annotations"] = records[0]["annotations"][:2]
    assert score(cfg, "mine")["bbox"]["AP"] == pytest.approx(100)
    assert not MetadataCatalog.get("mine").get("json_file")


def test_build_evaluator_after_a_conversion_by_detectron2(cfg, tmp_path):
    by_code("mine", 4)
    with contextlib.redirect_stdout(io.StringIO()):
        COCOEvaluator("mine", output_dir=str(tmp_path / "gone"))
    meta = MetadataCatalog.get("mine")
    Path(meta.json_file).unlink()
    assert score(cfg, "mine")["bbox"]["AP"] == pytest.approx(100)


def test_build_evaluator_unknown_type(cfg):
    by_code("mine", 1)
    MetadataCatalog.get("mine").set(evaluator_type="mine")
    with pytest.raises(ValueError, match=r"'mine' has evaluator_type 'mine'.*pascal_voc"):
        build_evaluator(cfg, "mine")


def test_build_evaluator_pascal_voc(cfg, tmp_path):
    by_code("mine", 1)
    meta = MetadataCatalog.get("mine")
    (tmp_path / "Annotations").mkdir()
    meta.set(evaluator_type="pascal_voc", dirname=str(tmp_path), split="val", year=2007)
    assert type(build_evaluator(cfg, "mine")).__name__ == "PascalVOCDetectionEvaluator"
