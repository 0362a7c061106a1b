"""The command line, and the checks before anything is built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo

from ssim_kd.engine import argument_parser, load_config, recipe, run
from ssim_kd.engine.preflight import check_start, settings_of
from ssim_kd.modeling import teacher_source
from ssim_kd.projects import add_project_configs
from tests.engine.runs import World


def test_load_config_unknown_key(world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DISTIL\.LOSS ssim"):
        world.cfg(tmp_path, "MODEL.DISTIL.LOSS", "ssim")
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.LOSS has no value"):
        world.cfg(tmp_path, "MODEL.DISTILL.LOSS")
    config = tmp_path / "unknown.yaml"
    config.write_text(f"_BASE_: {world.config}\nMODEL: {{DISTIL: {{LOSS: ssim}}}}\n")
    with pytest.raises(ValueError, match=r"unknown.yaml cannot be read: .*MODEL\.DISTIL"):
        world.cfg(tmp_path, config=config)


def test_load_config_unknown_key_that_is_like_a_known_one(world: World, tmp_path) -> None:
    meant = r"Did you mean MODEL\.DISTILL\.MGD\.MASK_RATIO\?"
    with pytest.raises(ValueError, match=meant):
        world.cfg(tmp_path, "MODEL.DISTILL.MGD.MASK_RATO", "0.5")
    config = tmp_path / "near.yaml"
    config.write_text(f"_BASE_: {world.config}\nMODEL: {{DISTILL: {{MGD: {{MASK_RATO: 0.5}}}}}}\n")
    with pytest.raises(ValueError, match=meant):
        world.cfg(tmp_path, config=config)
    for key, value in (("MODEL.DISTILL.NOTHING_OF_THE_KIND", "1"), ("SOLVER.MAX_ITER", "many")):
        with pytest.raises(ValueError, match=key) as caught:
            world.cfg(tmp_path, key, value)
        assert "Did you mean" not in str(caught.value)


def test_load_config_unknown_key_of_a_section_with_a_key_that_others_have(world, tmp_path) -> None:
    meant = r"Did you mean MODEL\.DISTILL\.FGD\.TEMPERATURE\?"
    with pytest.raises(ValueError, match=meant):  # HEAD.TEMPERATURE is as near
        world.cfg(tmp_path, "MODEL.DISTILL.FGD.TEMPRATURE", "0.5")


@pytest.mark.parametrize("value", ["nan", ".nan", "-inf", "NaN"])
def test_load_config_number_that_is_not_finite(value: str, world: World, tmp_path) -> None:
    key = "MODEL.DISTILL.SSIM.SIGMA"
    with pytest.raises(ValueError, match=rf"{key} is {value}; expected a finite number"):
        world.cfg(tmp_path, key, value)


def test_load_config_whole_number_for_a_float(world: World, tmp_path) -> None:
    cfg = world.cfg(tmp_path, "MODEL.DISTILL.SSIM.SIGMA", "2", "SOLVER.MAX_ITER", "7")
    assert world.cfg(tmp_path, "SOLVER.WEIGHT_DECAY", "-1e-3").SOLVER.WEIGHT_DECAY == -1e-3
    assert cfg.MODEL.DISTILL.SSIM.SIGMA == 2.0
    assert cfg.SOLVER.MAX_ITER == 7
    config = tmp_path / "whole.yaml"
    config.write_text(f"_BASE_: {world.config}\nMODEL: {{DISTILL: {{SSIM: {{SIGMA: 2}}}}}}\n")
    with pytest.raises(ValueError, match=r"SSIM.SIGMA \(where a float is expected, 2 is written"):
        world.cfg(tmp_path, config=config)


def test_check_config_device(world: World, tmp_path, monkeypatch) -> None:
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
def test_load_config_code(value, world: World, tmp_path) -> None:
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


def test_main_teacher_config_with_code(world: World, tmp_path) -> None:
    config = tmp_path / "evil.yaml"
    config.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(ValueError, match=r"NAME .*constructor for the tag .*os\.system"):
        world.main(tmp_path / "out", "MODEL.DISTILL.TEACHER.NAME", config)
    assert not (tmp_path / "ran").exists()


def test_load_config_teacher_beside_the_student(world: World, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = world.cfg(tmp_path, "MODEL.DISTILL.TEACHER.NAME", "teacher.yaml")
    assert Path(cfg.MODEL.DISTILL.TEACHER.NAME) == world.teacher_config


def test_load_config_no_file(world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        world.cfg(tmp_path, config=tmp_path / "nowhere.yaml")


def test_load_config_lazy_config() -> None:
    # Tools and functions that are only for YAML.
    line = ["--config-file", "COCO-Detection/plain_fcos_R_50_FPN_1x.py"]
    with pytest.raises(ValueError, match=r"plain_fcos_R_50_FPN_1x\.py is a LazyConfig.*\.yaml"):
        load_config(argument_parser().parse_args(line))


def test_load_config_no_yaml(world: World, tmp_path) -> None:
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
def test_load_config_no_keys(kind, world: World, tmp_path) -> None:
    text, expected = BROKEN[kind]
    config = tmp_path / "broken.yaml"
    config.write_text(text.replace("{file}", config.name))
    (tmp_path / "other.yaml").write_text(f"_BASE_: {config}\n")
    expected = expected.replace("{file}", r"broken\.yaml")
    with pytest.raises(ValueError, match=r"--config-file \S* cannot be read: .*" + expected):
        world.cfg(tmp_path, config=config)
    cfg = world.cfg(tmp_path, "MODEL.DISTILL.TEACHER.NAME", config)
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.TEACHER\.NAME .*" + expected):
        teacher_source(cfg)


def test_load_config_shared_base(world: World, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {world.config}\nVERSION: 2\n")
    config = tmp_path / "both.yaml"
    config.write_text("_BASE_: [a.yaml, b.yaml]\nSEED: 7\n")
    assert world.cfg(tmp_path, config=config).SEED == 7


def test_load_config_zoo_anchors(world: World, tmp_path) -> None:
    zoo = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"_BASE_: {zoo}\nMODEL: {{DEVICE: cpu}}\n")
    for config in (mine, zoo):
        found = world.cfg(tmp_path, "MODEL.DEVICE", "cpu", config=config)
        assert found.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32
    mine.write_text(f"_BASE_: {zoo}\nOUTPUT_DIR: !!python/name:os.system\n")
    with pytest.raises(ValueError, match=r"mine\.yaml asks to run code"):
        world.cfg(tmp_path, config=mine)


def test_check_config_teacher_without_student(world: World, tmp_path) -> None:
    plain = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE is 'GeneralizedRCNN'.*'DistilledDet"):
        world.cfg(tmp_path, *plain)
    world.cfg(tmp_path, *plain, "MODEL.DISTILL.ENABLED", "False")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.MAX_ITER", 0, "is 0; expected 1 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "is 0; expected 1 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", -1, "is -1; expected 1 or more"),
        ("SOLVER.MAX_SKIPPED_STEPS", -1, "is -1; expected 0"),
        ("OUTPUT_DIR", "", "is ''; expected a folder"),
        ("MODEL.DISTILL.TEACHER.EXPECTED_AP", -5, r"is -5\.0; expected an AP in \[0, 100\]"),
        ("MODEL.DISTILL.TEACHER.EXPECTED_AP", 200, r"is 200\.0; expected an AP"),
    ],
)
def test_check_config_values(key, value, expected, world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{key} {expected}"):
        world.cfg(tmp_path, key, value)


def test_main_expected_ap_of_no_set(world: World, tmp_path) -> None:
    options = ("MODEL.DISTILL.TEACHER.EXPECTED_AP", 20, "DATASETS.TEST", "()")
    with pytest.raises(ValueError, match=r"EXPECTED_AP is 20\.0, but DATASETS\.TEST is \(\)"):
        world.main(tmp_path, *options)


def test_main_expected_ap_of_other_classes(world: World, tmp_path) -> None:
    classes = ("MODEL.DISTILL.TEACHER.OPTS", ["MODEL.ROI_HEADS.NUM_CLASSES", 80])
    with pytest.raises(ValueError, match=r"80 classes.* have 10 .*EXPECTED_AP to 0"):
        world.main(tmp_path, *classes, "MODEL.DISTILL.TEACHER.EXPECTED_AP", 20)
    with pytest.raises(ValueError, match=r"80 classes.*leave --eval-teacher out"):
        world.main(tmp_path, "--eval-teacher", *classes)


@pytest.mark.parametrize("flag", ["--eval-only", "--eval-teacher"])
def test_main_evaluates_on_nothing(flag, world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is \(\).*nothing to evaluate on"):
        world.main(tmp_path, flag, "DATASETS.TEST", "()")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.pth", None, "no such file"),
        ("cut.pth", b"PK", r"\(2 bytes\) is not a checkpoint"),
        ("cut.pkl", b"", r"\(0 bytes\) is not a checkpoint"),
        ("https://192.0.2.1/weights.pkl", None, "is not available"),
    ],
)
def test_main_unreadable_weights(
    name, content, expected, world: World, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(recipe, "check_datasets", None)  # not yet
    path = name if "://" in name else tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"MODEL\.WEIGHTS is '\S*{name}'.*{expected}"):
        world.main(tmp_path / "out", "MODEL.WEIGHTS", path)


def test_check_start_resumed(world: World, tmp_path, monkeypatch) -> None:
    settings = settings_of(world.cfg(tmp_path, "MODEL.WEIGHTS", "/nowhere.pth"))
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is '/nowhere\.pth': no such file"):
        check_start(settings, resume=True)
    (tmp_path / "model_0000002.pth").touch()
    check_start(settings, resume=True)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS"):
        check_start(settings, resume=False)


@pytest.mark.parametrize("flags", [(), ("--eval-teacher",)])
def test_main_output_dir_that_is_no_folder(flags, world: World, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"OUTPUT_DIR is '\S*/file', which is a file"):
        world.main(file, *flags)
    with pytest.raises(ValueError, match=r"OUTPUT_DIR is '\S*/below', which cannot be made \(Not"):
        world.main(file / "below", *flags)


@pytest.mark.parametrize("value", ["-1.0", ".nan", ".inf", "1.0e+300"])
def test_check_config_grace_period(value, world: World, tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"_BASE_: {world.config}\nSOLVER: {{GRACE_PERIOD: {value}}}\n")
    with pytest.raises(ValueError, match=r"SOLVER\.GRACE_PERIOD is .*; expected seconds, 0 or mo"):
        world.cfg(tmp_path, config=config)
    assert world.cfg(tmp_path, "SOLVER.GRACE_PERIOD", "0").SOLVER.GRACE_PERIOD == 0


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_argument_parser_flag_after_pairs(flag) -> None:
    pairs = ["SOLVER.MAX_ITER", "3", "SEED", "-1"]
    args = argument_parser().parse_args(["--config-file", "x.yaml", *pairs, flag])
    assert args.opts == pairs and args.resume + args.eval_only == 1


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.DISTILL.ENABLED", "yes"), ("SOLVER.MAX_ITER", "1e3")]
)
def test_load_config_value_of_another_type(key, value, world: World, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{key} {value}: "):
        world.cfg(tmp_path, key, value)


def test_load_config_home(world: World, tmp_path, monkeypatch) -> None:
    """ "~" is the user's home in every path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(world.config, tmp_path / "student.yaml")
    shutil.copy(world.teacher_config, tmp_path / "teacher.yaml")
    paths = {
        "OUTPUT_DIR": "~/out",
        "MODEL.WEIGHTS": "~/start.pth",
        "MODEL.DISTILL.TEACHER.NAME": "~/teacher.yaml",
        "MODEL.DISTILL.TEACHER.WEIGHTS": "~/teacher.pth",
        "DATASETS.PROPOSAL_FILES_TRAIN": "('~/p.pkl',)",
    }
    line = ["--config-file", "~/student.yaml", *(text for pair in paths.items() for text in pair)]
    cfg = load_config(argument_parser().parse_args(line), add_project_configs)
    home = str(tmp_path)
    assert f"{home}/out" == cfg.OUTPUT_DIR and f"{home}/start.pth" == cfg.MODEL.WEIGHTS
    assert f"{home}/teacher.yaml" == cfg.MODEL.DISTILL.TEACHER.NAME
    assert f"{home}/teacher.pth" == cfg.MODEL.DISTILL.TEACHER.WEIGHTS
    assert (f"{home}/p.pkl",) == cfg.DATASETS.PROPOSAL_FILES_TRAIN


@pytest.mark.parametrize("flag", ["--eval-only", "--eval-teacher"])
def test_main_evaluation_keeps_the_config_of_the_training(flag, world: World, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("of the training")
    weights = ("MODEL.WEIGHTS", world.teacher, "MODEL.FPN.OUT_CHANNELS", 48)
    results = world.main(tmp_path, flag, *weights)
    assert "bbox" in results and "log.txt" in os.listdir(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "of the training"


def test_run_prints_one_line_of_an_error_before_the_first_step(
    world: World, tmp_path, capfd
) -> None:
    line = world.arguments(tmp_path, "MODEL.DISTILL.TEACHER.WEIGHTS", "/nowhere.pth")
    with pytest.raises(SystemExit) as stopped:
        run(argument_parser().parse_args(line), add_project_configs)
    output = capfd.readouterr()
    assert stopped.value.code == 1
    last = output.err.rstrip().splitlines()[-1]
    assert last.startswith("ERROR: MODEL.DISTILL.TEACHER.WEIGHTS is '/nowhere.pth'")
    assert "Traceback" not in output.err + output.out
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_run_prints_one_line_of_a_training_that_diverges(world: World, tmp_path, capfd) -> None:
    options = ("SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0, "DATASETS.TEST", "()")
    with pytest.raises(SystemExit) as stopped:
        run(argument_parser().parse_args(world.arguments(tmp_path, *options)), add_project_configs)
    output = capfd.readouterr()
    assert stopped.value.code == 1
    text = output.out + output.err
    assert text.count("Not finite at iteration") == 1 and "Traceback" not in text
    assert "learning rate" in output.err.splitlines()[-1]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_run_prints_one_line_of_an_error_before_there_is_a_log(capfd) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(argument_parser().parse_args(["NO.KEY", "3"]), add_project_configs)
    assert stopped.value.code == 1
    assert capfd.readouterr().err.startswith("ERROR: NO.KEY 3: ")


def test_run_keeps_the_traceback_of_an_unexpected_error(capfd) -> None:
    def add(cfg: object) -> None:
        raise KeyError("a mistake of the user's code")

    with pytest.raises(KeyError, match="mistake"):
        run(argument_parser().parse_args([]), add)


def test_run_prints_one_line_of_an_error_of_spawned_processes(
    world: World, tmp_path, capfd
) -> None:
    options = ("--num-gpus", "MODEL.DISTILL.TEACHER.WEIGHTS", "/nowhere.pth")
    line = world.arguments(tmp_path, "--dist-url=auto", *options)
    with pytest.raises(SystemExit) as stopped:
        run(argument_parser().parse_args(line), add_project_configs)
    output = capfd.readouterr()
    assert stopped.value.code == 1
    last = output.err.rstrip().splitlines()[-1]
    assert last.startswith("ERROR: MODEL.DISTILL.TEACHER.WEIGHTS is '/nowhere.pth'")
    assert "Traceback" not in output.err + output.out


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",  # of the zoo
        "COCO-Detection/plain_faster_rcnn_R_50_FPN_1x.yaml",  # shipped
        "~/student.yaml",
    ],
)
def test_run_of_a_config_that_is_no_file_of_the_working_directory(
    name, world: World, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(world.config, tmp_path / "student.yaml")
    line = ["--config-file", name, "OUTPUT_DIR", str(tmp_path / "out")]
    line += ["MODEL.WEIGHTS", "/nowhere.pth"]
    with pytest.raises(SystemExit):
        run(argument_parser().parse_args(line), add_project_configs)
    # What follows default_setup.
    assert "ERROR: MODEL.WEIGHTS is '/nowhere.pth'" in capfd.readouterr().err
    text = (tmp_path / "out/log.txt").read_text()
    assert "Contents of args.config_file=/" in text and f"{Path(name).name}:" in text
    assert (tmp_path / "out/config.yaml").is_file()


def test_load_config_unknown_section_in_a_file(world: World, tmp_path) -> None:
    config = tmp_path / "near.yaml"
    for text, meant in (("MODEL: {DISTIL: {LOSS: l2}}", "MODEL.DISTILL"), ("SOLVR: {}", "SOLVER")):
        config.write_text(f"_BASE_: {world.config}\n{text}\n")
        with pytest.raises(ValueError, match=rf"Did you mean {meant}\?"):
            world.cfg(tmp_path, config=config)
