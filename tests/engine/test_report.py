"""The report at the end of a training, and what the log has for it."""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ssim_kd
from ssim_kd.engine import report
from ssim_kd.reporting.runs import read_run
from ssim_kd.run_file import read_run_file
from tests.engine.runs import World, checkpoint, log

SHORT = ("SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 10)


def test_training_leaves_a_report(world: World, tmp_path: Path) -> None:
    # The scores of three iterations: without a threshold something is detected.
    options = (*SHORT, "TEST.REPORT", True, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    world.main(tmp_path / "run", *options)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    run = read_run(tmp_path / "run")
    assert run.distils and run.problems == []
    for name in ("total_loss", "loss_distill", "distill/ssim_p2", "distill/ssim_p6", "time"):
        assert f'aria-label="{name}: run"' in page, name
    assert 'aria-label="AP50 that each kind of error costs: run"' in page
    assert page.count("data:image/jpeg") == 4 and "digits_val" in page
    assert run.commit and run.commit in page and run.environment["PyTorch"] in page
    assert "Report: " in log(tmp_path / "run")
    assert shlex.split(run.command)[-len(sys.argv) :] == sys.argv
    facts = read_run_file(tmp_path / "run")
    assert (facts["config"], facts["seed"], facts["ssim_kd"]) == ("YAML", 1, ssim_kd.__version__)
    assert facts["teacher"]["weights"] == run.teacher["weights"] == str(world.teacher)
    assert facts["teacher"]["sha256"] == hashlib.sha256(world.teacher.read_bytes()).hexdigest()
    assert not (tmp_path / "run" / "student.yaml").read_text().count("REPORT")


def test_training_goes_well_where_the_report_fails(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "report.html").mkdir(parents=True)
    world.main(folder, *SHORT, "TEST.REPORT", True)
    assert checkpoint(folder)["iteration"] == 2
    errors = [line for line in log(folder).splitlines() if "ERROR" in line]
    assert len(errors) == 1 and "report.html" in errors[0] and "IsADirectoryError" in errors[0]


def test_training_without_report(world: World, tmp_path: Path) -> None:
    world.main(tmp_path / "run", *SHORT, "DATASETS.TEST", "()")
    assert not (tmp_path / "run" / "report.html").exists()


def test_write_report_without_its_package(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger="ssim_kd"):
        report.write_report(str(tmp_path))
    (record,) = caplog.records
    assert record.levelname == "INFO" and "pip install 'ssim_kd[report]'" in record.getMessage()
    assert not list(tmp_path.iterdir())


def test_write_report_in_one_process_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report.comm, "is_main_process", lambda: False)
    report.write_report(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "repository" / "ssim_kd"
    package.mkdir(parents=True)
    (package / "x.py").touch()
    monkeypatch.setattr(report, "_PACKAGE", package)
    assert report.commit() == ""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        command = ["git", *identity, "-C", str(tmp_path / "repository"), *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    assert re.fullmatch("[0-9a-f]{10}", report.commit())
    (package / "x.py").write_text("changed = 1")
    assert re.fullmatch(r"[0-9a-f]{10}\+", report.commit())
    # An environment inside of another repository.
    monkeypatch.setattr(report, "_PACKAGE", package / "site-packages" / "ssim_kd")
    (package / "site-packages" / "ssim_kd").mkdir(parents=True)
    assert report.commit() == ""
