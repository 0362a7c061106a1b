"""ssim-kd: commands, help and wrong arguments, answered without torch."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from ssim_kd.__main__ import COMMANDS, main
from ssim_kd.command_line import argument_parser, export_parser, quiet_libraries
from ssim_kd.engine import load_config
from ssim_kd.modeling import build_distillers
from ssim_kd.projects import add_project_configs
from tests.engine.runs import ROOT

PROGRAM = """
import sys
from ssim_kd.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print(sorted({"torch", "detectron2", "numpy"} & set(sys.modules)))
sys.exit(status)
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 2),
        (["--help"], 0),
        (["trian"], 2),
        (["--config"], 2),
        (["train", "SOLVER.MAX_ITER", "3", "--no-such-flag"], 2),
        (["export"], 2),
        *(([name, "--help"], 0) for name in COMMANDS),
    ],
)
def test_help_and_wrong_arguments_import_nothing(arguments: list[str], status: int) -> None:
    done = call(*arguments)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: " in done.stdout + done.stderr


def test_usage_names_every_command() -> None:
    text = call().stderr
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == [*COMMANDS]


def test_argument_parser_has_what_detectron2_has() -> None:
    ours, theirs = vars(argument_parser().parse_args([])), default_argument_parser().parse_args([])
    assert {name: ours[name] for name in vars(theirs)} == vars(theirs)
    given = ["--config-file", "a.yaml", "--num-gpus", "2", "--resume", "KEY", "VALUE", "x=1"]
    ours = vars(argument_parser().parse_args(given))
    theirs = vars(default_argument_parser().parse_args(given))
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("report", "jinja2", "report"), ("compare", "optuna", "study")],
)
def test_main_names_the_extra_of_a_package_that_is_missing(
    command: str, package: str, extra: str, monkeypatch, capsys
) -> None:
    def run(_: object) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setitem(COMMANDS, command, COMMANDS[command]._replace(run=run))
    assert main([command, "x"]) == 1
    assert f"{package!r}: pip install 'ssim_kd[{extra}]'" in capsys.readouterr().err


def test_parsers_take_flags_between_pairs(capsys) -> None:
    words = ["SEED", "1", "--teacher", "t", "SOLVER.BASE_LR", "-1e-3", "--resume", "KEY", "-inf"]
    args = argument_parser().parse_args(words)
    assert (args.teacher, args.resume) == ("t", True)
    assert args.opts == ["SEED", "1", "SOLVER.BASE_LR", "-1e-3", "KEY", "-inf"]
    words = ["SEED", "1", "--formats", "onnx", "KEY", "a", "--config-file", "c", "--output", "o"]
    args = export_parser().parse_args(words)
    assert args.formats == ["onnx"] and sorted(args.opts) == ["1", "KEY", "SEED", "a"]
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["SEED", "1", "--teachr", "t"])
    assert "--teachr" in capsys.readouterr().err


@pytest.mark.parametrize("order", [1, -1])
def test_export_parser_ends_formats_at_the_first_pair(order: int, capsys) -> None:
    parts = [["--config-file", "c", "--output", "o"], ["--formats", "stock", "int8"]][::order]
    pairs = ["MODEL.WEIGHTS", "a.pth", "SEED", "1"]
    args = export_parser().parse_args([*parts[0], *parts[1], *pairs])
    assert (args.formats, args.opts) == (["stock", "int8"], pairs)
    for wrong, named in ((["stock", "onyx", *pairs], "onyx"), (pairs, "MODEL.WEIGHTS")):
        with pytest.raises(SystemExit):
            export_parser().parse_args([*parts[0], "--formats", *wrong])
        assert named in capsys.readouterr().err


def test_quiet_libraries_of_a_machine_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    log = logging.getLogger("torch.utils.cpp_extension")
    log.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/opt/cuda")
    log.warning("another")
    assert [record.message for record in caplog.records] == ["another"]


METHOD = """
from detectron2.config import CfgNode as CN, configurable
from ssim_kd.losses import masked_mean
from ssim_kd.modeling import DISTILLER_REGISTRY, PyramidDistiller

@DISTILLER_REGISTRY.register()
class {name}(PyramidDistiller):
    @configurable
    def __init__(self, *, name="mine", **kwargs):
        super().__init__(name=name, **kwargs)

    def level_loss(self, maps, batch):
        return masked_mean((maps.student - maps.teacher).abs(), maps.mask)

def add_config(cfg):
    cfg.MODEL.DISTILL.MINE = CN({{"POWER": 2.0}})
"""


@pytest.mark.parametrize("form", ["file", "module", "entry point"])
def test_method_of_the_user(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"Mine{form.title().replace(' ', '')}"
    path = tmp_path / f"{name.lower()}.py"
    path.write_text(METHOD.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--import", str(path) if form == "file" else path.stem]
    if form == "entry point":
        info = tmp_path / "mine-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[ssim_kd.methods]\nmine = {path.stem}\n")
        flags = []
    opts = ["MODEL.DISTILL.NAME", name, "MODEL.DISTILL.MINE.POWER", "3", "MODEL.DEVICE", "cpu"]
    for _ in range(2):  # also if it was imported before
        cfg = load_config(argument_parser().parse_args([*flags, *opts]), add_project_configs)
    assert cfg.MODEL.DISTILL.MINE.POWER == 3.0
    assert [type(found).__name__ for found in build_distillers(cfg)] == [name]


def test_method_that_cannot_be_imported(tmp_path: Path) -> None:
    args = argument_parser().parse_args(["--import", str(tmp_path / "nowhere.py")])
    with pytest.raises(ValueError, match=r"--import .*nowhere\.py"):
        load_config(args, add_project_configs)
