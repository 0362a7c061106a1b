"""Evaluation of the student, in which the teacher has no part, and of the teacher by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssim_kd.engine.evaluation import build_evaluator
from ssim_kd.engine.preflight import check_teacher
from ssim_kd.engine.settings import Settings
from tests.engine.runs import World, save_random_detector

NO_TEACHER = (
    "MODEL.DISTILL.TEACHER.WEIGHTS",
    "/nowhere/teacher.pth",
    "MODEL.DISTILL.TEACHER.NAME",
    "/nowhere/teacher.yaml",
)


@pytest.fixture(scope="module")
def student(world: World, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student") / "model_0000004.pth"
    save_random_detector(world.config, path)
    return path


def test_student_for_evaluation_without_teacher(world: World, student: Path, tmp_path) -> None:
    results = world.main(tmp_path, "--eval-only", "MODEL.WEIGHTS", student, *NO_TEACHER)
    assert "AP" in results["bbox"]
    assert (tmp_path / "inference" / "coco_instances_results.json").exists()


def test_student_for_evaluation_without_weights(world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty; --eval-only expects"):
        world.main(tmp_path, "--eval-only", *NO_TEACHER)


def test_student_for_evaluation_weights_that_fit_in_part(
    world: World, student: Path, tmp_path
) -> None:
    state = torch.load(student)["model"]
    headless = tmp_path / "headless.pth"
    torch.save({"model": {k: v for k, v in state.items() if "box_predictor" not in k}}, headless)
    for path, expected in ((headless, "4 keys missing"), (world.teacher, "of another shape")):
        with pytest.raises(ValueError, match=expected):
            world.main(tmp_path, "--eval-only", "MODEL.WEIGHTS", path, *NO_TEACHER)


def test_student_for_evaluation_resumed(world: World, student: Path, tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model_0000004.pth").write_bytes(student.read_bytes())
    (folder / "model_0000009.pth").write_bytes(student.read_bytes()[:5000])
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    options = ("--eval-only", "--resume", "MODEL.WEIGHTS", "/nowhere.pth", *NO_TEACHER)
    assert "bbox" in world.main(folder, *options)
    (folder / "model_0000004.pth").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        world.main(folder, *options)


def test_teacher_for_evaluation(world: World, tmp_path) -> None:
    results = world.main(tmp_path, "--eval-teacher")
    assert "AP" in results["bbox"]
    assert (tmp_path / "teacher" / "inference" / "coco_instances_results.json").exists()
    with pytest.raises(ValueError, match=r"TEACHER.WEIGHTS is '/nowhere.pth'"):
        world.main(tmp_path, "--eval-teacher", "MODEL.DISTILL.TEACHER.WEIGHTS", "/nowhere.pth")


def test_check_teacher_stops_the_run(world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"AP on .*EXPECTED_AP is 30\.0"):
        world.main(tmp_path, "MODEL.DISTILL.TEACHER.EXPECTED_AP", 30.0)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    ("results", "passes"),
    [
        ({"bbox": {"AP": 30.0}}, True),
        ({"first": {"bbox": {"AP": 30.0}}, "second": {"bbox": {"AP": 1.0}}}, True),
        ({"bbox": {"AP": 29.9}}, False),
        ({"bbox": {"AP": float("nan")}}, False),
        ({"sem_seg": {"mIoU": 50.0}}, False),
        ({}, False),
    ],
)
def test_check_teacher(results, passes) -> None:
    settings = Settings("out", 1, expected_ap=30.0, keys={"expected_ap": "EXPECTED_AP"})
    if passes:
        check_teacher(settings, results)
    else:
        with pytest.raises(ValueError, match=r"EXPECTED_AP is 30\.0"):
            check_teacher(settings, results)


def test_main_expected_results(world: World, student: Path, tmp_path) -> None:
    expected = json.dumps([["bbox", "AP", 50.0, 0.1]])
    with pytest.raises(SystemExit) as stopped:
        world.main(
            tmp_path,
            "--eval-only",
            "MODEL.WEIGHTS",
            student,
            "TEST.EXPECTED_RESULTS",
            expected,
            *NO_TEACHER,
        )
    assert stopped.value.code == 1


def test_build_evaluator_unknown_kind(world: World, tmp_path) -> None:
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("of_an_unknown_kind").evaluator_type = "panorama"
    with pytest.raises(ValueError, match="'panorama'; expected one of"):
        build_evaluator(world.cfg(tmp_path), "of_an_unknown_kind")
