"""The commands and code of the pages: each is run, or read by the program that it names.

docs/own_data.md is followed from its first to its last command in test_own_data.py, the method of
projects/README.md is built in tests/projects/test_readme.py.
"""

from __future__ import annotations

import argparse
import configparser
import functools
import inspect
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf

from ssim_kd import DistilledDetector, FrozenTeacher, SSIMDistiller
from ssim_kd.__main__ import COMMANDS as ssim_kd_commands
from ssim_kd.command_line import _Parser
from ssim_kd.config_loading.yaml_config import apply_data
from ssim_kd.engine import argument_parser, load_config
from ssim_kd.modeling import external_teacher, teacher_source
from ssim_kd.projects import add_project_configs
from tests.documentation import PAGES, ROOT, commands, fences, name, user_folder
from tests.engine.runs import World, save_random_detector
from tests.helpers import build, full_config, make_batch, stock_config, train_losses

COMMANDS = sorted({(name(page), text) for page in PAGES for text in commands(page, prose=True)})


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A user's folder after the commands of the pages: with a teacher and a distilled student."""
    folder = tmp_path_factory.mktemp("user")
    world = user_folder(folder)
    for run, config, flags in (
        ("teacher", "teacher.yaml", []),
        ("distilled", "student.yaml", ["--teacher", str(folder / "output/teacher")]),
    ):
        output = folder / "output" / run
        output.mkdir(parents=True)
        data = ["--data", str(folder / "data.yaml")]
        arguments = ["--config-file", str(folder / config), *data, *flags]
        cfg = load_config(argument_parser().parse_args(arguments), add_project_configs)
        (output / "config.yaml").write_text(cfg.dump())
        save_random_detector(output / "config.yaml", output / "model_final.pth")
    return world


class Parsed(Exception):
    """Carries what a program read from its command line."""

    def __init__(self, found: argparse.Namespace) -> None:
        self.found = found


@pytest.fixture
def read_arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts a program with its arguments, and stops it once it has read them."""
    parsers = {kind: kind.parse_args for kind in (argparse.ArgumentParser, _Parser)}

    def stop(parser: Any, parse: Any, *args: Any) -> None:
        raise Parsed(parse(parser, *args))

    def read(program: str, arguments: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with monkeypatch.context() as patch:
            for parser, parse in parsers.items():
                patch.setattr(parser, "parse_args", functools.partialmethod(stop, parse))
            with pytest.raises(Parsed) as stopped:
                if program.endswith(".py"):
                    runpy.run_path(str(ROOT / program), run_name="__main__")
                else:
                    runpy.run_module(program, run_name="__main__")
        return stopped.value.found

    return read


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if "mykd" not in c[1].lower()])
def test_commands_are_read_by_their_programs(
    page: str, command: str, user: World, read_arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user.folder)
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[1:])
        words = [launch.training_script, *launch.training_script_args]
    if words[0] == "srun":
        words = words[words.index("./train_net.py") :]
    if words[0] == "python":
        words = words[1:]
    program, *arguments = words
    if program == "-m":
        program, *arguments = arguments
    if program == "ssim-kd":
        program = "ssim_kd"
        if len(arguments) == 1:  # the name of a command
            assert arguments[0] in ssim_kd_commands
            return
    if program == "make":
        check_make(shlex.split(command))
    elif program == "pip":
        check_pip(arguments)
    elif program == "pytest":
        assert (ROOT / arguments[0]).exists()
    elif program in (".", "bash"):
        (file,) = arguments
        assert file.startswith(".venv/") or (ROOT / file).is_file()
    elif program == "tensorboard":
        assert shutil.which(program, path=str(Path(sys.executable).parent))
    else:
        args = read_arguments(program.removeprefix("./"), arguments)
        for word in arguments:
            made = word.startswith("studies/output/")
            if word.startswith(("configs/", "docs/", "projects/", "studies/")) and not made:
                assert (ROOT / word).exists(), word
        config_file = getattr(args, "config_file", "")
        if config_file.startswith(("configs/", "projects/")) and not Path(config_file).exists():
            monkeypatch.chdir(ROOT)
        # A LazyConfig: tests/engine/test_lazy.py.
        if config_file and not config_file.endswith(".py"):
            check_config(args)


def check_make(words: list[str]) -> None:
    """The target exists."""
    variables = [word for word in words[1:] if "=" in word]
    targets = [word for word in words[1:] if "=" not in word]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for variable in variables:
        assert re.search(rf"^{variable.split('=')[0]} \?=", makefile, flags=re.M), variable


def check_pip(arguments: list[str]) -> None:
    """What it installs exists: a file, this folder, extras of it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert arguments[0] == "install"
    for word in arguments[1:]:
        what, _, extras = word.partition("[")
        assert what in ("-e", "-r", ".", "ssim_kd") or (ROOT / what).exists(), word
        for extra in filter(None, extras.rstrip("]").split(",")):
            assert extra in setup["options.extras_require"], word


def check_config(args: argparse.Namespace) -> None:
    """The config, its overrides and its teacher are what a run would take."""
    known = vars(argument_parser().parse_args([]))
    given = argparse.Namespace(**{**known, **{k: v for k, v in vars(args).items() if k in known}})
    cfg = load_config(given, add_project_configs)
    if cfg.MODEL.DISTILL.TEACHER.NAME:
        assert teacher_source(cfg).weights
    assert cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    weights = cfg.MODEL.WEIGHTS
    if weights.startswith("detectron2://COCO"):
        url = model_zoo.get_checkpoint_url("/".join(weights.split("/")[2:4]) + ".yaml")
        assert url.endswith(weights.removeprefix("detectron2://"))


def test_commands_that_are_wrong_fail(user: World, read_arguments: Any) -> None:
    for program, arguments in (
        ("ssim_kd", ["export", "--config-file", "x.yaml"]),  # lacks --output
        ("tools/demo.py", ["--fast"]),
        ("train_net.py", ["--config"]),
        ("ssim_kd", ["doctor", "--unknown"]),
    ):
        with pytest.raises(SystemExit):
            read_arguments(program, arguments)
    with pytest.raises(AssertionError, match="demos"):
        check_make(["make", "demos"])
    for words in (["install", "ssim_kd[nothing]"], ["install", "-r", "requirement.txt"]):
        with pytest.raises(AssertionError):
            check_pip(words)
    args = argument_parser().parse_args(["--config-file", "COCO-Detection/ssim_retina.yaml"])
    with pytest.raises(ValueError, match="ssim_retina"):
        check_config(args)


def test_yaml_of_the_pages_is_a_config_or_a_data_file(user: World) -> None:
    found = [(page, text) for page in PAGES for text in fences(page, "yaml")]
    assert len(found) >= 4
    for number, (page, text) in enumerate(found):
        content = yaml.safe_load(text)
        assert content, page
        content.pop("_BASE_", None)
        cfg = full_config()
        if "arms" in content:  # tests/comparing/test_short_form.py
            continue
        if "train" in content:
            path = user.folder / f"data{number}.yaml"
            path.write_text(text)
            apply_data(cfg, str(path), ())
        else:
            cfg.merge_from_other_cfg(CfgNode(content))


def test_configs_of_small_runs_are_trained(user: World, tmp_path: Path) -> None:
    for file, text in zip(
        ("student", "teacher"), fences(ROOT / "docs/small_runs.md", "yaml"), strict=True
    ):
        (tmp_path / f"{file}.yaml").write_text(text)
        arguments = ["--config-file", str(tmp_path / f"{file}.yaml"), "--epochs", "1"]
        arguments += ["--data", str(user.folder / "data.yaml")]
        cfg = load_config(argument_parser().parse_args(arguments), add_project_configs)
        assert "loss_cls" in train_losses(build(cfg), make_batch([(96, 96)]))
    assert cfg.MODEL.RESNETS.DEPTH == 34 and cfg.MODEL.DISTILL.IN_FEATURES == ["p2", "p3"]


def test_python_of_the_pages_is_run() -> None:
    """Who adds a block adds it to the tests below."""
    counts = {name(page): len(fences(page, "python")) for page in PAGES}
    expected = {"docs/own_code.md": 4, "docs/teachers.md": 3, "projects/README.md": 4}
    expected["docs/trackers.md"] = 2  # tests/trackers/test_trackers.py
    expected["docs/export.md"] = 1  # tests/test_export.py
    assert {page: count for page, count in counts.items() if count} == expected


def run_block(page: str, number: int, **names: Any) -> dict[str, Any]:
    """Run a block of a page; returns the variables after it."""
    exec(compile(fences(ROOT / page, "python")[number], f"{page}, block {number}", "exec"), names)
    return names


def test_own_code_two_lines_of_code_and_three_keys(user: World) -> None:
    cfg = get_cfg()
    run_block("docs/own_code.md", 0, cfg=cfg)
    cfg.merge_from_file(str(user.folder / "my_detector.yaml"))
    text = (ROOT / "docs/own_code.md").read_text(encoding="utf-8").replace("\n", " ")
    pairs = re.findall(r"`(MODEL\.[A-Z._]+) (DistilledDetector|GeneralizedRCNN|output/\w+)`", text)
    assert len(pairs) == 3
    values = {"output/teacher": str(user.folder / "output/teacher")}
    cfg.merge_from_list([x for key, value in pairs for x in (key, values.get(value, value))])
    model = build(cfg)
    assert type(model) is DistilledDetector
    assert "loss_distill" in train_losses(model, make_batch([(96, 96)]))


def small_student() -> torch.nn.Module:
    return build(stock_config("faster"))


def test_own_code_lazy_config(user: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user.folder)
    (text,) = (x for x in fences(ROOT / "docs/own_code.md", "python") if "LazyC" in x or "L(" in x)
    teacher = re.search(r"name=\"([^\"]+)\"", text)
    assert teacher and model_zoo.get_config_file(teacher[1])
    names: dict[str, Any] = {
        **{"L": LazyCall, "model": LazyCall(small_student)(), "SSIMDistiller": SSIMDistiller},
        **{"DistilledDetector": DistilledDetector, "FrozenTeacher": FrozenTeacher},
    }
    exec(text.replace(teacher[1], "output/teacher"), names)
    config = OmegaConf.create(
        {"model": names["model"], "train": {"max_iter": 7}}, flags={"allow_objects": True}
    )
    model = instantiate(config.model)
    assert model.max_iter == 7
    assert model.distillers["ssim"].weight(0.5) == 4.0
    assert "loss_distill" in train_losses(model, make_batch([(96, 96)]))


def test_own_code_distill(user: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user.folder)
    config = user.folder / "my_detector.yaml"  # evaluated only at the end
    config.write_text(config.read_text() + "\nTEST: {EVAL_PERIOD: 100}\n")
    (text,) = (x for x in fences(ROOT / "docs/own_code.md", "python") if "distill(" in x)
    names: dict[str, Any] = {}
    exec(text.replace("epochs=12", "epochs=2"), names)
    # 2 epochs of 6 images, a batch of 4.
    assert names["trainer"].max_iter == 3
    assert (user.folder / "output/distilled/model_final.pth").is_file()


def test_own_code_pyramid_loss() -> None:
    maps = [[torch.rand(1, 4, s, s) for s in (12, 6)] for _ in range(2)]
    names = run_block("docs/own_code.md", 3, student_maps=maps[0], teacher_maps=maps[1])
    assert names["by_level"].shape == (2,)
    assert names["total"] == pytest.approx(float(names["by_level"].sum()))


class Pooled(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.avg_pool2d(images, 8)]


def test_teachers_page_rtdetr(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader itself is tested with a folder; here its name would be downloaded."""
    signature, asked = inspect.signature(external_teacher.load_rtdetr), []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append(signature.bind(*args, **kwargs).args)
        shapes = {"p3": ShapeSpec(channels=3, stride=8)}
        zero, one = [0.0] * 3, [1.0] * 3
        return external_teacher.ModuleTeacher(Pooled(), shapes, pixel_mean=zero, pixel_std=one)

    monkeypatch.setattr(external_teacher, "load_rtdetr", load)
    assert isinstance(run_block("docs/teachers.md", 0)["teacher"], FrozenTeacher)
    assert asked == [("PekingU/rtdetr_r50vd",)]


def test_teachers_page_any_module() -> None:
    teacher = run_block("docs/teachers.md", 1)["teacher"]
    maps = teacher.load(["res3", "res4"])([torch.zeros(3, 64, 96)])
    assert maps["res3"].shape == (1, 128, 8, 12) and maps["res4"].shape == (1, 256, 4, 6)


def test_teachers_page_timm_in_stock_detectron2() -> None:
    cfg = get_cfg()
    run_block("docs/teachers.md", 2, cfg=cfg)
    (text,) = fences(ROOT / "docs/teachers.md", "yaml")
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text)))
    assert cfg.MODEL.TIMM.NAME.startswith("mobilenetv3")
