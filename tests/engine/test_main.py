"""The command line: what is wrong is said before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo

from tests.engine.runs import World


def test_an_unknown_key(world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"DISTIL\.LOSS.*Expected KEY VALUE pairs of known keys"):
        world.cfg(tmp_path, "MODEL.DISTIL.LOSS", "ssim")
    with pytest.raises(ValueError, match="KEY VALUE pairs"):
        world.cfg(tmp_path, "MODEL.DISTILL.LOSS")
    config = tmp_path / "unknown.yaml"
    config.write_text(f"_BASE_: {world.config}\nMODEL: {{DISTIL: {{LOSS: ssim}}}}\n")
    with pytest.raises(ValueError, match=r"unknown.yaml cannot be read: .*MODEL\.DISTIL"):
        world.cfg(tmp_path, config=config)


def test_a_whole_number_for_a_float(world: World, tmp_path) -> None:
    cfg = world.cfg(tmp_path, "MODEL.DISTILL.LOSS_WEIGHT", "2", "SOLVER.MAX_ITER", "7")
    assert cfg.MODEL.DISTILL.LOSS_WEIGHT == 2.0
    assert cfg.SOLVER.MAX_ITER == 7
    config = tmp_path / "whole.yaml"
    config.write_text(f"_BASE_: {world.config}\nMODEL: {{DISTILL: {{LOSS_WEIGHT: 2}}}}\n")
    with pytest.raises(ValueError, match=r"LOSS_WEIGHT \(where a float is expected, 2 is written"):
        world.cfg(tmp_path, config=config)


def test_a_device_that_is_not_there(world: World, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"MODEL.DEVICE is 'cuda', but no GPU.* MODEL.DEVICE cpu"):
        world.cfg(tmp_path, "MODEL.DEVICE", "cuda")


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {folder}/ran']",
        "!!python/object/new:os.system ['touch {folder}/ran']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_a_config_cannot_run_code(value, world: World, tmp_path) -> None:
    config = tmp_path / "evil.yaml"
    value = value.format(folder=tmp_path)
    config.write_text(f"_BASE_: {world.config}\nOUTPUT_DIR: {value}\n")
    with pytest.raises(ValueError, match=r"asks to run code .* which is refused"):
        world.cfg(tmp_path, config=config)
    evil_base = tmp_path / "base.yaml"
    evil_base.write_text(f"_BASE_: {config}\n")
    with pytest.raises(ValueError, match="asks to run code"):
        world.cfg(tmp_path, config=evil_base)
    assert not (tmp_path / "ran").exists()


def test_a_teachers_config_cannot_run_code(world: World, tmp_path) -> None:
    config = tmp_path / "evil.yaml"
    config.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(ValueError, match="The teacher's config cannot be read"):
        world.main(tmp_path / "out", "MODEL.DISTILL.TEACHER.CONFIG_FILE", config)
    assert not (tmp_path / "ran").exists()


def test_a_teachers_config_may_lie_beside_the_students(world: World, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = world.cfg(tmp_path, "MODEL.DISTILL.TEACHER.CONFIG_FILE", "teacher.yaml")
    assert Path(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE) == world.teacher_config


def test_a_config_file_that_is_not_there(world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read"):
        world.cfg(tmp_path, config=tmp_path / "nowhere.yaml")


def test_a_config_file_that_is_no_yaml(world: World, tmp_path) -> None:
    config = tmp_path / "broken.yaml"
    config.write_text("MODEL: {DEVICE: cpu\n")
    with pytest.raises(ValueError, match=r"(?s)broken\.yaml cannot be read: .*line 2"):
        world.cfg(tmp_path, config=config)


def test_detectron2s_own_configs_may_compute_their_anchors(world: World, tmp_path) -> None:
    zoo = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"_BASE_: {zoo}\nMODEL: {{DEVICE: cpu}}\n")
    for config in (mine, zoo):
        found = world.cfg(tmp_path, "MODEL.DEVICE", "cpu", config=config)
        assert found.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32
    mine.write_text(f"_BASE_: {zoo}\nOUTPUT_DIR: !!python/name:os.system\n")
    with pytest.raises(ValueError, match=r"mine\.yaml asks to run code"):
        world.cfg(tmp_path, config=mine)


def test_a_teacher_that_nothing_learns_from(world: World, tmp_path) -> None:
    plain = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE is 'GeneralizedRCNN'.*'DistilledDet"):
        world.cfg(tmp_path, *plain)
    world.cfg(tmp_path, *plain, "MODEL.DISTILL.ENABLED", "False")


@pytest.mark.parametrize("value", ["-1.0", ".nan", ".inf", "1.0e+300"])
def test_a_grace_period_that_is_none(value, world: World, tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"_BASE_: {world.config}\nSOLVER: {{GRACE_PERIOD: {value}}}\n")
    with pytest.raises(ValueError, match=r"SOLVER\.GRACE_PERIOD is .*; expected seconds, 0 or mo"):
        world.cfg(tmp_path, config=config)
    assert world.cfg(tmp_path, "SOLVER.GRACE_PERIOD", "0").SOLVER.GRACE_PERIOD == 0
