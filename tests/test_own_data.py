"""docs/own_data.md, followed literally: its commands, in its order."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from ssim_kd.__main__ import main
from tests.documentation import ROOT, commands, user_folder


def test_own_data_page_from_a_folder_of_images_to_an_exported_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_folder(tmp_path)  # the user's two configs, small; the rest is the page's
    found = list(commands(ROOT / "docs/own_data.md"))
    assert len(found) == 8
    monkeypatch.chdir(tmp_path)
    for command in found:
        program, *arguments = shlex.split(command.replace("--epochs 12", "--epochs 2"))
        assert program == "ssim-kd"
        assert main(arguments) == 0
    log = (tmp_path / "output/distilled/log.txt").read_text()
    # 6 images, 2 epochs, batch 4.
    assert (tmp_path / "all.html").is_file()
    assert "MAX_ITER 3" in log and "3 classes" in log
    assert "loss_distill" in (tmp_path / "output/distilled/metrics.json").read_text()
    assert "loss_distill" not in (tmp_path / "output/plain/metrics.json").read_text()
    # What is written for others names the trained weights and the classes.
    student = (tmp_path / "output/distilled/student.yaml").read_text()
    assert "WEIGHTS: model_final.pth" in student and '["part0", "part1", "part2"]' in student
    # No warning is in the log of every run; Detectron2's are of a student that detects nothing.
    warnings = [line for line in log.splitlines() if "WARNING" in line and "d2." not in line]
    assert not [line for line in warnings if "detectron2." not in line]
    exported = {p.name for p in (tmp_path / "output/export").iterdir()}
    assert {"student.yaml", "model.pth", "model.ts"} <= exported
