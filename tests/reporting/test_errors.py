"""Kinds of errors and COCO's AP against figures that were worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssim_kd.reporting.detections import PREDICTIONS, read_detections
from ssim_kd.reporting.errors import KINDS, analyse, evaluate_boxes
from ssim_kd.reporting.runs import NotAvailableError
from tests.reporting.made import FOUND, TRUTH, box, read_set, write_run, write_set


def analysed(folder: Path, truth: list[dict], found: list[dict]):
    coco = read_set(write_set(folder / "data", truth))
    run = write_run(folder / "run", None, None, found=found)
    return coco, read_detections(run / PREDICTIONS, coco, limit=100)


def test_analyse_kinds_and_costs_by_hand(tmp_path: Path) -> None:
    _, detections = analysed(tmp_path, TRUTH, FOUND)
    errors = detections.errors
    assert [errors.kinds[i] for i in range(1, 10)] == [
        "correct",
        "duplicate",  # IoU 0.9 with the box that the first has taken
        "classification",  # IoU 1 with a box of b
        "localisation",  # IoU 40 / 160
        "both",  # IoU 50 / 150 with a box of a
        "background",  # on an image without boxes
        "ignored",  # inside a crowd
        "background",
        "correct",
    ]
    assert errors.counts == {**dict.fromkeys(KINDS, 1), "background": 2}
    assert errors.matches == {1: 1, 9: 6}
    # a: 2 boxes; wrong, right, wrong, ...: precision 1/2 up to a recall of 1/2, 51 of 101 points.
    # b: 3 boxes, the first is right: precision 1 up to a recall of 1/3, 34 points.
    assert errors.ap50 == pytest.approx(100 * (51 * 0.5 + 34) / 202)
    assert errors.costs == pytest.approx(
        {
            # a: the fifth is right: precision 2/5 on the 50 further points.
            "localisation": 100 * 50 * 0.4 / 202,
            # b: right, right, wrong: precision 1 up to a recall of 2/3, 67 points.
            "classification": 100 * (67 - 34) / 202,
            "both": 0.0,
            "duplicate": 0.0,
            # a: without the wrong one before, precision 1 on the 51 points.
            "background": 100 * 51 * 0.5 / 202,
            # b: of 2 boxes one is found: 51 points.
            "missed": 100 * (51 - 34) / 202,
        }
    )


def test_analyse_one_detection_mends_a_box(tmp_path: Path) -> None:
    # Two aim at the same box: the one with the higher score finds it, the other is gone.
    truth = [box(1, 1, 0, 0, 10, 10)]
    found = [box(1, 1, 6, 0, 10, 10, score=0.5), box(1, 1, 7, 0, 10, 10, score=0.9)]
    errors = analysed(tmp_path, truth, found)[1].errors
    assert errors.counts["localisation"] == 2 and errors.counts["missed"] == 0
    assert errors.ap50 == 0 and errors.costs["localisation"] == pytest.approx(100)


@pytest.mark.parametrize("found", [[], [box(1, 1, 0, 0, 10, 10, score=0.5)]])
def test_analyse_without_boxes(tmp_path: Path, found: list[dict]) -> None:
    errors = analysed(tmp_path, [], found)[1].errors
    assert math.isnan(errors.ap50)
    assert errors.counts == {**dict.fromkeys(KINDS, 0), "background": len(found)}


def test_analyse_without_detections(tmp_path: Path) -> None:
    errors = analysed(tmp_path, TRUTH, [])[1].errors
    assert errors.ap50 == 0 and errors.counts == {**dict.fromkeys(KINDS, 0), "missed": 5}


def test_evaluate_boxes_by_class_and_size_by_hand(tmp_path: Path) -> None:
    # a: IoU 0.82, right at 7 of the 10 thresholds; b: exact, and large.
    truth = [box(1, 1, 0, 0, 10, 10), box(1, 2, 0, 0, 100, 100)]
    found = [box(1, 1, 0, 0, 10, 8.2, score=0.9), box(1, 2, 0, 0, 100, 100, score=0.9)]
    coco, detections = analysed(tmp_path, truth, found)
    ap = evaluate_boxes(coco, detections.found)
    assert math.isnan(ap.pop("APm"))
    expected = {"AP": 85, "AP50": 100, "AP75": 100, "APs": 70, "APl": 100, "AP-a": 70, "AP-b": 100}
    assert ap == pytest.approx(expected)


def test_analyse_agrees_with_evaluate_boxes(tmp_path: Path, monkeypatch) -> None:
    """And both implementations of COCO's AP with each other."""
    generator = np.random.default_rng(0)

    def boxes(count: int, **more: bool) -> list[dict]:
        places = generator.integers(0, 60, size=(count, 2))
        sizes = generator.integers(5, 40, size=(count, 2))
        kinds = generator.integers(1, 3, size=(count, 2))
        scored = more.get("scored", False)
        return [
            box(int(k[0]), int(k[1]), *map(float, p), *map(float, s))
            | (
                {"score": float(generator.random())}
                if scored
                else {"iscrowd": int(k[0] * k[1] == 4)}
            )
            for p, s, k in zip(places, sizes, kinds, strict=True)
        ]

    truth, found = boxes(40), boxes(80, scored=True)
    found += [{**b, "score": float(generator.random())} for b in truth[::2]]
    coco, detections = analysed(tmp_path, truth, found)
    assert detections.errors.ap50 == pytest.approx(evaluate_boxes(coco, detections.found)["AP50"])
    assert 0 < detections.errors.ap50 < 100
    assert "ignored" in detections.errors.kinds.values()
    monkeypatch.setattr("ssim_kd.data.coco_scores.is_fast", lambda truth: False)
    assert analyse(coco, detections.found) == detections.errors


def test_analyse_agrees_with_tidecv(tmp_path: Path) -> None:
    tide = pytest.importorskip("tidecv", reason="its package asks for another build of OpenCV")
    # Without the crowd, in which tidecv counts errors and COCO does not.
    truth = [a for a in TRUTH if not a.get("iscrowd")]
    _, detections = analysed(tmp_path, truth, FOUND)
    theirs, ours = tide.Data("truth"), tide.Data("found")
    for image in (1, 2, 3):
        theirs.add_image(image, str(image))
    for category in (1, 2):
        theirs.add_class(category, str(category))
    for a in truth:
        theirs.add_ground_truth(a["image_id"], a["category_id"], a["bbox"])
    for d in FOUND:
        ours.add_detection(d["image_id"], d["category_id"], d["score"], d["bbox"])
    run = tide.TIDE()
    found = run.evaluate(theirs, ours, mode=tide.TIDE.BOX)
    costs = run.get_main_errors()["found"]
    names = dict(zip(("Loc", "Cls", "Both", "Dupe", "Bkg", "Miss"), KINDS, strict=True))
    counts = {names[kind.short_name]: len(all_) for kind, all_ in found.error_dict.items()}
    assert detections.errors.counts == counts
    for name, kind in names.items():
        assert detections.errors.costs[kind] == pytest.approx(costs[name], abs=0.01), kind


DEEP = "[" * 90_000
ROW = box(1, 1, 0, 0, 10, 10, score=0.5)


@pytest.mark.parametrize("change", [None, {"bbox": ["x", 0, 1, 1]}, {"category_id": 9}, DEEP])
def test_read_truth_malformed(change: Any, tmp_path: Path) -> None:
    truth = [*TRUTH, {**TRUTH[0], **change} if isinstance(change, dict) else change]
    entry = write_set(tmp_path)
    content = json.loads(Path(entry[1]).read_text()) | {"annotations": truth}
    Path(entry[1]).write_text(json.dumps(content).replace(f'"{DEEP}"', DEEP))
    with pytest.raises(NotAvailableError, match=r"truth\.json"):
        read_set(entry)


@pytest.mark.parametrize(
    "found",
    [DEEP, [None], [{**ROW, "score": "x"}], [{**ROW, "bbox": [1]}], [{**ROW, "image_id": []}]],
)
def test_read_detections_malformed(found: Any, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    truth = read_set(write_set(tmp_path / "data"))
    with pytest.raises(NotAvailableError, match=r"found\.json is not readable"):
        read_detections(path, truth, limit=100)
