"""docs/own_data.md, followed literally: its commands, in its order."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest
from detectron2.utils import logger

from tests.documentation import ROOT, commands, user_folder


def test_own_data_page_from_a_folder_of_images_to_an_exported_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_folder(tmp_path)  # the user's two configs, small; the rest is the page's
    found = list(commands(ROOT / "docs/own_data.md"))
    assert len(found) == 6
    monkeypatch.chdir(tmp_path)
    # Detectron2 keeps log files open by their name, and other tests have the same names elsewhere.
    logger.setup_logger.cache_clear()
    logger._cached_log_stream.cache_clear()
    for command in found:
        # Each script as its own interpreter would run it, but without the seconds of its imports.
        script, *arguments = shlex.split(command.removeprefix("python "))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    log = (tmp_path / "output/distilled/log.txt").read_text()
    # 6 images, 2 epochs, batch 4.
    assert "MAX_ITER 3" in log and "3 classes" in log
    assert "loss_distill" in (tmp_path / "output/distilled/metrics.json").read_text()
    assert "loss_distill" not in (tmp_path / "output/plain/metrics.json").read_text()
    exported = {p.name for p in (tmp_path / "output/export").iterdir()}
    assert {"student.yaml", "model.pth", "model.ts"} <= exported
