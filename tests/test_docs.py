"""The documentation: links lead somewhere, files and keys that are named exist."""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path

import pytest
from detectron2 import model_zoo

from ssim_kd.config_files import find_config_file
from tests.documentation import PAGES, ROOT, commands, name
from tests.helpers import full_config


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [t.split("#")[0] for t in targets if "://" not in t and not t.startswith("#")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_files_that_commands_name_exist(page: Path) -> None:
    found = re.findall(r"[\w./-]+/[\w.-]+\.(?:yaml|py)\b", page.read_text(encoding="utf-8"))
    shipped = [f for f in found if f.startswith(("configs/", "projects/", "COCO-Detection/"))]
    shipped = [f for f in shipped if "MyKD" not in f]  # the example of projects/README.md
    missing = [f for f in shipped if not (ROOT / f).exists() and find_config_file(f) == f]
    assert not missing
    for zoo in (f for f in found if f.startswith("new_baselines/")):
        assert model_zoo.get_config_file(zoo)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_keys_that_are_named_exist(page: Path) -> None:
    cfg = full_config()
    pattern = r"\b((?:MODEL|SOLVER|DATASETS|DATALOADER|INPUT|TEST)(?:\.[A-Z][A-Z0-9_]*)+)\b"
    unknown = []
    for key in set(re.findall(pattern, page.read_text(encoding="utf-8"))):
        node = cfg
        for part in key.split("."):
            if part not in node:
                unknown.append(key)
                break
            node = node[part]
    # The example of projects/README.md.
    assert set(unknown) <= {"MODEL.DISTILL.MYKD", "MODEL.DISTILL.MYKD.POWER"}


@pytest.fixture(scope="module")
def tests_by_file() -> dict[str, set[str]]:
    files = [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("projects/*/tests/test_*.py")]
    found: dict[str, set[str]] = {}
    for file in files:
        found.setdefault(file.name, set()).update(re.findall(r"def (test_\w+)", file.read_text()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_tests_that_are_named_exist(page: Path, tests_by_file) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "ssim_kd|tests|tools|studies|runs|third_party|docs|projects|configs"
    named = set(re.findall(rf"`((?:{folders})/[\w./*{{}}-]+)", text))
    missing = {f for f in named if not ({*ROOT.glob(f)} | {*page.parent.glob(f)})}
    assert all("MyKD" in f for f in missing), missing
    files = set(re.findall(r"\b(test_\w+\.py)", text)) - {"test_mykd.py"}
    assert files <= set(tests_by_file)
    for file, test in re.findall(r"\b(test_\w+\.py)::(test_\w+\*?)", text):
        pattern = test.replace("*", r"\w*")
        assert any(re.fullmatch(pattern, known) for known in tests_by_file[file]), (file, test)
    every = set().union(*tests_by_file.values())
    for end in re.findall(r"`\.\.\.(_\w+)`", text):
        assert any(known.endswith(end) for known in every), end


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_figure_begins_a_line_as_a_list_would(page: Path) -> None:
    """ "2800." at the start of a line would be shown as an item of a list."""
    assert not re.findall(r"^\s*\d{3,}\. .*", page.read_text(encoding="utf-8"), flags=re.M)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize("page", ["README.md", "docs/own_data.md"])
def test_the_control_is_trained_first(page: str) -> None:
    students = [c for c in commands(ROOT / page) if " train " in c and c[-14:] != "output/teacher"]
    taught = ["--teacher" in command for command in students]
    assert taught == sorted(taught) and taught[0] != taught[-1]


def test_installation_names_every_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert not [e for e in setup["options.extras_require"] if f"`{e}`" not in text]


@pytest.mark.parametrize("folder", ["tools", "runs", "studies"])
def test_what_has_a_shebang_can_be_called(folder: str) -> None:
    scripts = [f for f in ROOT.glob(f"{folder}/**/*") if f.suffix in (".py", ".sh")]
    found = [f for f in scripts if f.read_bytes().startswith(b"#!")]
    assert found and not [f for f in found if not os.access(f, os.X_OK)]
