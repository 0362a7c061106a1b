"""The config that a run was started with, next to that of now."""

from __future__ import annotations

from detectron2.config import get_cfg

from ssim_kd.engine.settings import as_text, differences


def test_differences_name_key_and_values() -> None:
    started, now = get_cfg(), get_cfg()
    assert differences(*(as_text(c, left_out=("OUTPUT_DIR",)) for c in (now, started))) == []
    now.OUTPUT_DIR = "elsewhere"
    now.SOLVER.STEPS = (3, 4)
    now.MODEL.MINE = 1
    del now.INPUT["CROP"]
    found = differences(*(as_text(c, left_out=("OUTPUT_DIR",)) for c in (now, started)))
    assert "SOLVER.STEPS: [3, 4] (was: [30000])" in found
    assert "MODEL.MINE: 1 (was: no such key)" in found
    assert "INPUT.CROP.ENABLED: no such key (was: False)" in found
    assert not any("OUTPUT_DIR" in line for line in found)
