"""COCO's AP by both implementations: the same numbers.

pycocotools divides by a sum to which it adds 2e-16, so that 1 of 1 is 0.9999999999999998 there.
"""

import contextlib
import copy
import importlib.util
import io
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ssim_kd.data import register_coco
from ssim_kd.data.coco_scores import is_fast, score
from ssim_kd.engine.coco_evaluation import ScoredCOCOEvaluator
from tests.data.coco_sets import write

SIDE, CLASSES = 160, 6
SPACING = float(np.spacing(1))


def _mask(box):
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    x, y, w, h = (int(v) for v in box)
    mask[y : y + h, x : x + w : 2] = 1
    return mask_util.encode(mask)


def _object(draw, image, **more):
    side = draw.uniform(1, 120, 2)
    box = [*draw.uniform(0, SIDE - side), *side]
    points = np.column_stack([draw.uniform(0, SIDE, (17, 2)), draw.integers(0, 3, 17)]).ravel()
    return {
        "image_id": image,
        "category_id": int(draw.integers(1, CLASSES)),
        "bbox": [float(v) for v in box],
        "segmentation": _mask(box),
        "keypoints": points.tolist(),
        "num_keypoints": int((points[2::3] > 0).sum()),
        **more,
    }


def sets(seed, *, images=40, step=1):
    """Ground truth with crowds and a class without objects; detections near it, of equal scores."""
    draw = np.random.default_rng(seed)
    numbers = [step * i + 1 for i in range(images)]
    truth = [_object(draw, draw.choice(numbers).item()) for _ in range(3 * images)]
    results = []
    for number, annotation in enumerate(truth, start=1):
        crowd = int(draw.random() < 0.1)
        annotation.update(id=number, iscrowd=crowd, area=float(np.prod(annotation["bbox"][2:])))
        for _ in range(draw.integers(0, 4)):
            found = {k: copy.deepcopy(v) for k, v in annotation.items() if k not in ("id", "area")}
            jitter = draw.normal(0, 3, 4)
            found["bbox"] = np.clip(np.array(found["bbox"]) + jitter, 1, SIDE).tolist()
            found["segmentation"] = _mask(found["bbox"])
            found["category_id"] = (
                int(draw.integers(1, CLASSES)) if draw.random() < 0.2 else found["category_id"]
            )
            found.pop("iscrowd"), found.pop("num_keypoints")
            results.append({**found, "score": round(float(draw.random()), 1)})
    results += [
        {**_object(draw, draw.choice(numbers).item()), "score": float(draw.random())}
        for _ in range(2 * images)
    ]
    content = {
        "images": [
            {"id": i, "height": SIDE, "width": SIDE, "file_name": f"{i}.png"} for i in numbers
        ],
        "annotations": truth,
        "categories": [{"id": i + 1, "name": f"class{i}"} for i in range(CLASSES)],
    }
    return content, results


def load(content, results, task):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        left_out = {"bbox": (), "segm": ("bbox",), "keypoints": ("bbox", "segmentation")}[task]
        rows = [{k: v for k, v in row.items() if k not in left_out} for row in results]
        return truth, truth.loadRes(copy.deepcopy(rows))


@pytest.fixture
def without(monkeypatch):
    """Take faster-coco-eval away."""

    def _without():
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        monkeypatch.setattr("ssim_kd.data.coco_scores.importlib.util.find_spec", lambda name: None)

    return _without


needs_both = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval"
)


@needs_both
@pytest.mark.parametrize(
    "options", [{}, {"limits": (1, 10, 300)}, {"limits": (1, 2, 3)}, {"images": [1, 2, 3, 8]}]
)
@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", [0, 1])
def test_score_same_numbers(task, options, seed, without):
    content, results = sets(seed)
    found = []
    for fast in (True, False):
        if not fast:
            without()
        truth, detections = load(content, results, task)
        assert is_fast(truth) == fast
        scores = score(truth, detections, task, **options)
        with contextlib.redirect_stdout(io.StringIO()):
            scores.summarize()
        found.append((scores.eval["precision"], scores.eval["recall"], scores.stats))
    assert found[0][2][0] > 0
    np.testing.assert_array_equal(found[0][1], found[1][1])
    for fast, slow in zip(*found, strict=True):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=SPACING)


@needs_both
def test_score_sigmas(without):
    content, results = sets(2)
    sigmas = np.linspace(0.02, 0.3, 17)
    fast = score(*load(content, results, "keypoints"), "keypoints", sigmas=sigmas)
    without()
    slow = score(*load(content, results, "keypoints"), "keypoints", sigmas=sigmas)
    np.testing.assert_array_equal(fast.eval["recall"], slow.eval["recall"])
    precision = fast.eval["precision"], slow.eval["precision"]
    np.testing.assert_allclose(*precision, rtol=0, atol=SPACING)


@pytest.mark.parametrize("key", ["image_id", "category_id"])
@pytest.mark.parametrize("rename", ["i{}".format, lambda i: 2**60 + i])
def test_score_ids_that_only_pycocotools_takes(key, rename):
    content, results = sets(0, images=4)
    table = content["images" if key == "image_id" else "categories"]
    for row, name in [(i, "id") for i in table] + [
        (a, key) for a in [*content["annotations"], *results]
    ]:
        row[name] = rename(row[name])
    truth, detections = load(content, results, "bbox")
    assert not is_fast(truth)
    assert score(truth, detections, "bbox").eval["precision"].max() > 0


@pytest.mark.parametrize("limit", [None, 300])
@pytest.mark.parametrize("any_found", [True, False])
def test_evaluator_is_detectron2s(cfg, tmp_path, limit, any_found):
    content, results = sets(3)
    cfg.DATASETS.REGISTER_COCO = [["scored", *write(tmp_path, to_json(content), pictures=False)]]
    register_coco(cfg)
    DatasetCatalog.get("scored")
    numbers = MetadataCatalog.get("scored").thing_dataset_id_to_contiguous_id
    tables, files = [], []
    for kind in (COCOEvaluator, ScoredCOCOEvaluator):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        options = {} if kind is ScoredCOCOEvaluator else {"use_fast_impl": False}
        evaluator = kind("scored", output_dir=str(folder), max_dets_per_image=limit, **options)
        evaluator.reset()
        for image in content["images"]:
            rows = [r for r in results if r["image_id"] == image["id"]] if any_found else []
            found = Instances((SIDE, SIDE))
            boxes = torch.tensor([r["bbox"] for r in rows]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            found.pred_boxes, found.scores = Boxes(boxes), torch.tensor([r["score"] for r in rows])
            found.pred_classes = torch.tensor([numbers[r["category_id"]] for r in rows]).long()
            masks = [mask_util.decode(r["segmentation"]) for r in rows]
            found.pred_masks = torch.from_numpy(np.stack(masks)) if rows else torch.zeros(0, 1, 1)
            evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
        with contextlib.redirect_stdout(io.StringIO()):
            tables.append(evaluator.evaluate())
        files.append((folder / "coco_instances_results.json").read_text())
    assert set(tables[0]) == ({"bbox", "segm"} if any_found else {"bbox"})
    assert any_found or tables[1]["bbox"]["AP"] == 0  # for which Detectron2 has NaN
    for task, table in tables[0].items() if any_found else ():
        assert list(table) == list(tables[1][task])
        # In percent.
        np.testing.assert_allclose(
            list(table.values()), list(tables[1][task].values()), rtol=0, atol=1e-13
        )
    assert files[0] == files[1]


def to_json(content):
    content = copy.deepcopy(content)
    for annotation in content["annotations"]:
        counts = annotation["segmentation"]["counts"]
        annotation["segmentation"]["counts"] = counts.decode()
    return content
