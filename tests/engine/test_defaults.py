"""The command line: what is wrong is said before anything is built."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo

from ssim_kd.engine import main as main_function
from ssim_kd.engine.preflight import check_start
from ssim_kd.modeling.teacher_config import teacher_config
from tests.engine.runs import World

main_module = sys.modules[main_function.__module__]


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


BROKEN = {
    "empty": ("", r"{file} is empty; expected keys and values"),
    "comment": ("# MODEL: later", r"{file} is empty"),
    "list": ("- MODEL\n", r"{file} holds a sequence of YAML; expected keys and values"),
    "text": ("MODEL", r"{file} holds a scalar of YAML"),
    "no base": (
        "_BASE_: nowhere.yaml\n",
        r"_BASE_ \S*/nowhere.yaml of \S*{file} cannot be opened \(No such file",
    ),
    "base of no name": ("_BASE_:\n", r"of \S*{file} cannot be opened \(Is a directory"),
    "own base": ("_BASE_: {file}\n", r"in a circle \(\S*{file} -> \S*{file}\)"),
    "circle": ("_BASE_: [other.yaml]\n", r"circle \(\S*{file} -> \S*other.yaml -> \S*{file}\)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_config_files_that_hold_no_config(kind, world: World, tmp_path) -> None:
    text, expected = BROKEN[kind]
    config = tmp_path / "broken.yaml"
    config.write_text(text.replace("{file}", config.name))
    (tmp_path / "other.yaml").write_text(f"_BASE_: {config}\n")
    expected = expected.replace("{file}", r"broken\.yaml")
    with pytest.raises(ValueError, match=r"--config-file \S* cannot be read: .*" + expected):
        world.cfg(tmp_path, config=config)
    cfg = world.cfg(tmp_path, "MODEL.DISTILL.TEACHER.CONFIG_FILE", config)
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.TEACHER\.CONFIG_FILE .*" + expected):
        teacher_config(cfg)


def test_two_bases_may_share_one(world: World, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {world.config}\nVERSION: 2\n")
    config = tmp_path / "both.yaml"
    config.write_text("_BASE_: [a.yaml, b.yaml]\nSEED: 7\n")
    assert world.cfg(tmp_path, config=config).SEED == 7


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


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.CHECKPOINT_PERIOD", 0, "is 0; expected 1 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", -1, "is -1; expected 1 or more"),
        ("SOLVER.MAX_SKIPPED_STEPS", -1, "is -1; expected 0"),
        ("OUTPUT_DIR", "", "is ''; expected a folder"),
        ("MODEL.DISTILL.TEACHER.EXPECTED_AP", -5, r"is -5\.0; expected an AP in \[0, 100\]"),
        ("MODEL.DISTILL.TEACHER.EXPECTED_AP", 200, r"is 200\.0; expected an AP"),
    ],
)
def test_values_that_cannot_work(key, value, expected, world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{key} {expected}"):
        world.cfg(tmp_path, key, value)


def test_an_expected_ap_of_no_data_set(world: World, tmp_path) -> None:
    options = ("MODEL.DISTILL.TEACHER.EXPECTED_AP", 20, "DATASETS.TEST", "()")
    with pytest.raises(ValueError, match=r"EXPECTED_AP is 20\.0, but DATASETS\.TEST is \(\)"):
        world.cfg(tmp_path, *options)
    world.cfg(tmp_path, *options, "MODEL.DISTILL.ENABLED", "False")


def test_an_expected_ap_of_a_teacher_of_other_classes(world: World, tmp_path) -> None:
    classes = ("MODEL.DISTILL.TEACHER.OPTS", ["MODEL.ROI_HEADS.NUM_CLASSES", 80])
    with pytest.raises(ValueError, match=r"80 classes .*have 10: .*EXPECTED_AP to 0"):
        world.cfg(tmp_path, *classes, "MODEL.DISTILL.TEACHER.EXPECTED_AP", 20)
    world.cfg(tmp_path, *classes)
    with pytest.raises(ValueError, match=r"80 classes .*leave --eval-teacher out"):
        world.main(tmp_path, "--eval-teacher", *classes)


@pytest.mark.parametrize("flag", ["--eval-only", "--eval-teacher"])
def test_an_evaluation_on_nothing(flag, world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is \(\).*nothing to evaluate on"):
        world.cfg(tmp_path, flag, "DATASETS.TEST", "()")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.pth", None, "no such file"),
        ("cut.pth", b"PK", r"\(2 bytes\) is not a checkpoint"),
        ("cut.pkl", b"", r"\(0 bytes\) is not a checkpoint"),
        ("https://192.0.2.1/weights.pkl", None, "is not available"),
    ],
)
def test_a_students_weights_that_cannot_be_read(
    name, content, expected, world: World, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(main_module, "check_datasets", None)  # not yet
    path = name if "://" in name else tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"MODEL\.WEIGHTS is '\S*{name}'.*{expected}"):
        world.main(tmp_path / "out", "MODEL.WEIGHTS", path)


def test_a_resumed_run_needs_no_start(world: World, tmp_path, monkeypatch) -> None:
    cfg = world.cfg(tmp_path, "MODEL.WEIGHTS", "/nowhere.pth")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is '/nowhere\.pth': no such file"):
        check_start(cfg, resume=True)
    (tmp_path / "model_0000002.pth").touch()
    check_start(cfg, resume=True)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS"):
        check_start(cfg, resume=False)


@pytest.mark.parametrize("flags", [(), ("--eval-teacher",)])
def test_an_output_dir_that_is_none(flags, world: World, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"OUTPUT_DIR is '\S*/file', which is a file"):
        world.main(file, *flags)
    with pytest.raises(ValueError, match=r"OUTPUT_DIR is '\S*/below', which cannot be made \(Not"):
        world.main(file / "below", *flags)


@pytest.mark.parametrize("value", ["-1.0", ".nan", ".inf", "1.0e+300"])
def test_a_grace_period_that_is_none(value, world: World, tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"_BASE_: {world.config}\nSOLVER: {{GRACE_PERIOD: {value}}}\n")
    with pytest.raises(ValueError, match=r"SOLVER\.GRACE_PERIOD is .*; expected seconds, 0 or mo"):
        world.cfg(tmp_path, config=config)
    assert world.cfg(tmp_path, "SOLVER.GRACE_PERIOD", "0").SOLVER.GRACE_PERIOD == 0
