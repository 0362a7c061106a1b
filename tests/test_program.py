"""ssim-kd: commands, help and wrong arguments, answered without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser

from ssim_kd.__main__ import COMMANDS
from ssim_kd.command_line import argument_parser
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
        (["train", "SOLVER.MAX_ITER", "3", "--resume"], 2),
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
