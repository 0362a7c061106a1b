"""Reading of a run's folder, whole and damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ssim_kd.reporting.runs import read_run
from tests.reporting.made import config, rows, write_run, write_set


def run_of(folder: Path, metrics: list[dict], **keys):
    return read_run(write_run(folder / "run", config(write_set(folder / "data"), **keys), metrics))


def test_read_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, rows(ap=30.0))
    assert run.problems == [] and not run.distils and not run.is_lazy
    assert run.test_sets == ["made_val"] and run.get("SOLVER.MAX_ITER") == 60
    assert run.boxes()["AP"].iterations == [29, 60] and run.boxes()["AP"].values == [25.0, 30.0]
    assert run.boxes()["AP-b"].values[-1] == 31.0
    assert run.environment["GPU 0"] == "NVIDIA H100"
    assert run.commit == "1234567890+" and run.memory == 1200 and "x.yaml" in run.command


@pytest.mark.parametrize("text", ["", "[1]", '{"commit": ', "[" * 90_000])
def test_read_run_with_a_damaged_run_file(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "run", config(write_set(tmp_path / "data")), rows())
    (folder / "run.json").write_text(text)
    run = read_run(folder)
    assert run.commit == "" and len(run.problems) == 1 and "run.json" in run.problems[0]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_read_run_of_a_folder_that_is_none(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    if kind == "empty":
        folder.mkdir()
    if kind == "file":
        folder.touch()
    with pytest.raises(ValueError, match="RUN is") as caught:
        read_run(folder)
    assert str(folder) in str(caught.value) and "metrics.json" in str(caught.value)


def test_read_run_that_was_resumed(tmp_path: Path) -> None:
    # Stopped after 79, resumed from 40: what came after is written again, on another grid.
    before = [{"iteration": i, "total_loss": 1.0, "old": 1.0} for i in (19, 39, 59, 79)]
    after = [{"iteration": i, "total_loss": 2.0} for i in (49, 69, 89)]
    run = run_of(tmp_path, before + after)
    assert run.series["total_loss"].iterations == [19, 39, 49, 69, 89]
    assert run.series["total_loss"].values == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert run.series["old"].iterations == [19, 39]


def test_read_run_that_began_anew_in_the_same_folder(tmp_path: Path) -> None:
    before = [{"iteration": i, "distill/ssim_p3": 1.0, "total_loss": 1.0} for i in (19, 39)]
    run = run_of(tmp_path, [*before, {"iteration": 9, "total_loss": 2.0}])
    assert list(run.series) == ["total_loss"]


def test_read_run_with_metrics_that_come_a_step_late(tmp_path: Path) -> None:
    late = [{"iteration": 20, "lr": 0.1}, {"iteration": 19, "total_loss": 1.0}]
    run = run_of(tmp_path, [*late, {"iteration": 40, "lr": 0.1}])
    assert run.series["lr"].iterations == [20, 40]
    assert run.series["total_loss"].iterations == [19]


def test_read_run_with_an_evaluation_behind_later_losses(tmp_path: Path) -> None:
    losses = [{"iteration": i, "total_loss": 1.0} for i in (39, 59, 79)]
    evaluations = [{"iteration": i, "bbox/AP": 1.0} for i in (49, 79)]
    run = run_of(tmp_path, [losses[0], losses[1], evaluations[0], losses[2], evaluations[1]])
    assert run.series["total_loss"].iterations == [39, 59, 79]
    # Resumed from 50, with the evaluation that was cut: in the order of one write.
    again = [{"iteration": 69, "total_loss": 2.0}, {"iteration": 49, "bbox/AP": 2.0}]
    run = run_of(tmp_path / "resumed", [*losses[:2], evaluations[0], losses[2], *again])
    assert run.series["total_loss"].iterations == [39, 59, 69]
    assert run.series["bbox/AP"].values == [2.0]


def test_read_run_with_damaged_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", None, rows(), facts=None)
    bad = ['{"iteration": 70, "total_l', "[1]", '{"total_loss": 1}', "\x00\x00"]
    with open(folder / "metrics.json", "a") as file:
        file.write("\n".join([*bad, json.dumps({"iteration": 79, "total_loss": 0.5, "note": "x"})]))
    run = read_run(folder)
    assert run.series["total_loss"].iterations == [19, 39, 59, 79]
    problems = " ".join(run.problems)
    assert "4 of 10 lines" in problems and "config.yaml" in problems and "run.json" in problems


def test_read_run_with_values_that_are_not_finite(tmp_path: Path) -> None:
    metrics = [
        {"iteration": i, "total_loss": v} for i, v in ((1, 1.0), (2, math.inf), (3, math.nan))
    ]
    series = run_of(tmp_path, metrics).series["total_loss"]
    assert series.iterations == [1, 2, 3] and series.finite() == [(1, 1.0)]


def test_read_run_with_several_test_sets(tmp_path: Path) -> None:
    metrics = [{"iteration": 9, "first/bbox/AP": 1.0, "a/b/bbox/AP": 2.0, "a/b/segm/AP50": 3.0}]
    run = run_of(tmp_path, metrics, DATASETS__TEST=["first", "a/b"])
    assert run.boxes()["AP"].values == [2.0] and run.boxes(0)["AP"].values == [1.0]
    assert set(run.evaluations()) == {("first", "bbox"), ("a/b", "bbox"), ("a/b", "segm")}


def test_read_run_of_a_lazy_config(tmp_path: Path) -> None:
    text = """
model:
  _target_: ssim_kd.modeling.DistilledDetector
  teacher: {name: output/teacher, _target_: ssim_kd.modeling.FrozenTeacher.load_from}
  norm: !!python/name:torch.nn.BatchNorm2d ''
  size: !!python/tuple [1, 2]
  made: !!python/object/apply:os.system ["touch code_was_run"]
dataloader:
  train: {total_batch_size: 16}
  test: {dataset: {names: coco_2017_val}}
train: {max_iter: 90, device: cuda}
"""
    run = read_run(write_run(tmp_path / "run", text, rows()))
    assert run.is_lazy and run.distils and run.test_sets == ["coco_2017_val"]
    assert run.get("MODEL.DEVICE", "train.device") == "cuda" and not run.problems
    assert run.config["model.size"] == [1, 2] and run.boxes()["AP"].values[-1] == 29.5
    assert not Path("code_was_run").exists()


# Two to the power of 300 values.
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 300))


@pytest.mark.parametrize(
    "text",
    ["a: [1, 2", "- 1", "", "\x01", BOMB, "a: &a [*a]", "a: " + "[" * 900, "a: " + "9" * 5000],
)
def test_read_run_with_a_damaged_config(tmp_path: Path, text: str) -> None:
    run = read_run(write_run(tmp_path / "run", text, rows()))
    assert run.config == {} and any("config.yaml" in problem for problem in run.problems)
    assert run.series["total_loss"].iterations == [19, 39, 59]
