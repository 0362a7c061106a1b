"""projects/README.md: its table is up to date, and the method that it adds works as printed."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode

import ssim_kd.projects
from ssim_kd.engine import argument_parser, load_config
from ssim_kd.modeling import DISTILLER_REGISTRY, build_distillers
from ssim_kd.projects import add_project_configs
from tests.helpers import full_config
from tools import methods_table

README = methods_table.README.read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def committed() -> dict[str, dict[str, str]]:
    """The rows of the table in the README, by method."""
    text = README.split(methods_table.BEGIN)[1].split(methods_table.END)[0]
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    found = [dict(zip(cells(head), cells(row), strict=True)) for row in rows]
    return {row["method"]: row for row in found}


def test_the_table_is_what_the_tool_writes() -> None:
    """All but the figures of runs, which are those of the machine that committed them."""
    expected = {row["method"]: row for row in methods_table.rows()}
    found = committed()
    assert list(found) == list(expected), "run tools/methods_table.py"
    for method, row in expected.items():
        assert list(found[method]) == list(methods_table.COLUMNS)
        for column in ("paper", "levels or heads", "needs", "parameters"):
            assert found[method][column] == row[column], (method, column)
        for link in re.findall(r"\]\(([^)]+)\)", row["method"]):
            assert (methods_table.PROJECTS / link).is_dir(), link


def test_each_readme_has_the_figures_of_its_method() -> None:
    shown = 0
    for name, folder in methods_table.folders().items():
        readme = folder / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        assert methods_table.MEASURED in text, f"{readme} has no {methods_table.MEASURED}"
        block = text.split(methods_table.MEASURED)[1].split(methods_table.END_MEASURED)[0]
        assert block.strip() == methods_table.measured(name), f"run tools/methods_table.py: {name}"
        shown += block.count("| `")
    assert shown >= 11


def test_write_between_replaces_what_is_between_the_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- a -->\nold\n<!-- b -->\nafter\n")
    methods_table.write_between(readme, "<!-- a -->", "new", "<!-- b -->")
    assert readme.read_text() == "before\n<!-- a -->\nnew\n<!-- b -->\nafter\n"


def test_summary_without_a_key(monkeypatch) -> None:
    module = importlib.import_module("ssim_kd.projects.pkd")
    monkeypatch.setattr(module, "SUMMARY", {"method": "PKD"})
    with pytest.raises(ValueError, match=r"ssim_kd\.projects\.pkd: SUMMARY lacks") as caught:
        methods_table.summary("pkd")
    assert "'needs'" in str(caught.value)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch) -> str:
    """The package that the README describes, as a folder next to the others."""
    folder = tmp_path / "MyKD" / "mykd"
    folder.mkdir(parents=True)
    blocks = [textwrap.dedent(b) for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL)]
    for name, block in zip(("distiller", "config", "__init__", "test_mykd"), blocks, strict=True):
        (folder / f"{name}.py").write_text(block)
    paths = [*ssim_kd.projects.__path__, str(folder.parent)]
    monkeypatch.setattr(ssim_kd.projects, "__path__", paths)
    yield "mykd"
    DISTILLER_REGISTRY._obj_map.pop("MyDistiller", None)
    for module in [m for m in sys.modules if m.startswith("ssim_kd.projects.mykd")]:
        del sys.modules[module]


def test_the_method_of_the_readme_works(toy: str) -> None:
    cfg = full_config()
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    content = yaml.safe_load(textwrap.dedent(block))
    base = methods_table.PROJECTS / "MyKD" / "configs" / content.pop("_BASE_")
    assert base.resolve().is_file()
    cfg.merge_from_other_cfg(CfgNode(content))
    (distiller,) = build_distillers(cfg)
    assert distiller.name == toy
    assert methods_table.summary(toy)["method"] == "MyKD"
    # What step 5 asks for passes.
    module = importlib.import_module(f"ssim_kd.projects.{toy}.test_mykd")
    tests = module.TestMyKD()
    tests.test_by_hand()
    tests.test_the_formula_in_float64((33, 40))
    tests.test_an_option_out_of_range()


def test_the_command_of_the_readme_trains_with_the_method(toy: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    (block,) = (block for block in blocks if "MyDistiller" in block)
    cfgs = []
    for command in block.replace("\\\n", "").strip().splitlines():
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "train_net.py")
        args = argument_parser().parse_args(arguments)
        args.config_file = str(methods_table.ROOT / args.config_file)
        args.opts += ["MODEL.DEVICE", "cpu"]
        cfgs.append(load_config(args, add_project_configs))
    teacher, student = cfgs
    (distiller,) = build_distillers(student)
    assert distiller.name == toy and distiller.power == 1.0
    assert f"{teacher.OUTPUT_DIR}/model_final.pth" == student.MODEL.DISTILL.TEACHER.WEIGHTS
