"""The short form of a study, as studies/README.md has it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssim_kd.__main__ import main
from ssim_kd.comparing import running
from ssim_kd.comparing.records import Records
from ssim_kd.comparing.study import flattened, read_study
from tests.comparing.test_compare import Inline
from tests.documentation import fences, user_folder
from tests.engine.runs import ROOT, save_random_detector

(EXAMPLE,) = (text for text in fences(ROOT / "studies/README.md", "yaml") if "arms:" in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's: a detector, data, the folder of a teacher, and the example."""
    folder = tmp_path_factory.mktemp("user")
    user_folder(folder)
    teacher = folder / "output" / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "config.yaml").write_text((folder / "teacher.yaml").read_text())
    save_random_detector(folder / "teacher.yaml", teacher / "model_final.pth")
    (folder / "study.yaml").write_text(EXAMPLE)
    return folder


def changed(folder: Path, **changes: Any) -> str:
    content = {**yaml.safe_load(EXAMPLE), **changes}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_example_is_trained_at_the_first_try(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def call(command: list[str], out: Path, _: str) -> None:
        assert command[1:3] == ["-m", "ssim_kd"] and main(command[3:]) == 0
        running._add_usage(out, 1.0)

    monkeypatch.setattr(running, "build_executor", lambda *_: Inline())
    monkeypatch.setattr(running, "_call", call)  # in this process
    monkeypatch.chdir(tmp_path)  # paths are relative to the study
    flags = ["--seeds", "1", "--arms", "plain", "pkd", "--opts", "SOLVER.EPOCHS", "1.0"]
    assert main(["compare", str(folder / "study.yaml"), *flags]) == 0
    records = Records(folder / "results" / "study.json").runs
    assert records.keys() == {"students/plain/1", "students/pkd/1"}
    assert records["students/pkd/1"]["opts"]["MODEL.DISTILL.NAME"] == "PKDDistiller"
    for name in ("plain", "pkd"):
        run = folder / "output" / "study" / "students" / name / "1"
        assert ("distill/pkd_p2" in (run / "metrics.json").read_text()) == (name == "pkd")
    page = (folder / "results" / "study.md").read_text()
    assert "pkd − plain" in page and "| pkd | own |" in page and "## Models" not in page
    assert "Box AP on parts_test" in page
    assert "`ssim-kd compare study.yaml --docs results/study.md`" in page
    said = capsys.readouterr()
    assert "(2 of 2) students/pkd/1: AP" in said.out + said.err
    assert said.out.endswith(f"{folder / 'results' / 'study.md'}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.yaml"}, "nowhere.yaml"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"arms": {"plain": {}, "odd": {"method": "PKDDistil"}}}, "students/odd/1: .*PKDDistil"),
        ({"arms": {"plain": {}, "odd": {"weight": 1, "opts": {"SOLVER.MAX": 1}}}}, "SOLVER.MAX"),
        ({"arms": {"plain": {"wieght": 4}}}, "wieght"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"seeds": []}, "seeds"),
        ({"seed": [1]}, "seed"),
    ],
)
def test_wrong_study_trains_nothing(
    folder: Path, changes: dict[str, Any], message: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(running, "build_executor", lambda *_: None)
    assert main(["compare", changed(folder, **changes)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error and len(error.splitlines()) < 6


def test_config_on_a_base_of_the_zoo(folder: Path) -> None:
    base = "_BASE_: COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml\nMODEL: {WEIGHTS: ''}\n"
    (folder / "mine.yaml").write_text(base)
    study = read_study(Path(changed(folder, config="mine.yaml")))
    (run, *_) = study.stage("main", {})["pkd"].values()
    assert flattened(run.config)["MODEL.RESNETS.DEPTH"] == 50


def test_fingerprint_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    def fingerprints(path: Path) -> list[str]:
        runs = read_study(path).stage("main", {}).values()
        return [run.fingerprint for by_slot in runs for run in by_slot.values()]

    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("study"))
    assert fingerprints(folder / "study.yaml") == fingerprints(copy / "study.yaml")


def test_another_teacher_or_other_data_of_the_same_name_are_trained_anew(folder: Path) -> None:
    def fingerprints() -> tuple[str, str]:
        runs = read_study(folder / "study.yaml").stage("main", {})
        return tuple(next(iter(runs[arm].values())).fingerprint for arm in ("plain", "pkd"))

    plain, pkd = fingerprints()
    weights = folder / "output" / "teacher" / "model_final.pth"
    before = weights.read_bytes()
    weights.write_bytes(before + b"0")
    assert fingerprints()[0] == plain and fingerprints()[1] != pkd
    weights.write_bytes(before)
    assert fingerprints() == (plain, pkd)
    data = yaml.safe_load((folder / "data.yaml").read_text())
    annotations = folder / data["train"]["json"]
    before = annotations.read_bytes()
    annotations.write_bytes(before + b" ")
    assert fingerprints()[0] != plain and fingerprints()[1] != pkd
    annotations.write_bytes(before)


def test_train_refuses_the_folder_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    request = {"fingerprint": "x", "command": [], "opts": []}
    with pytest.raises(running.TrainingError, match="holds files"):
        running.train(request, str(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "mine"
