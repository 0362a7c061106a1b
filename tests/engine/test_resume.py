"""The config that a run was started with, beside that of now."""

from __future__ import annotations

from detectron2.config import get_cfg

from ssim_kd.engine.resume import differences, settings_of


def test_differences_name_key_and_values() -> None:
    started, now = get_cfg(), get_cfg()
    assert differences(settings_of(now), settings_of(started)) == []
    now.OUTPUT_DIR = "elsewhere"
    now.SOLVER.STEPS = (3, 4)
    now.MODEL.MINE = 1
    del now.INPUT["CROP"]
    found = differences(settings_of(now), settings_of(started))
    assert "SOLVER.STEPS: [3, 4] (was: [30000])" in found
    assert "MODEL.MINE: 1 (was: no such key)" in found
    assert "INPUT.CROP.ENABLED: no such key (was: False)" in found
    assert not any("OUTPUT_DIR" in line for line in found)
