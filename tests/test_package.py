"""What the package declares, and what it says where Detectron2 is missing."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import ssim_kd

ROOT = Path(__file__).resolve().parent.parent


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def parse(lines: str) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines.split("\n") if line.strip()]
    return {requirement.name: requirement for requirement in requirements}


def install_requires() -> dict[str, Requirement]:
    return parse(setup_cfg()["options"]["install_requires"])


def extra(name: str) -> dict[str, Requirement]:
    return parse(setup_cfg()["options.extras_require"][name])


def pins(name: str) -> dict[tuple[str, str], Version]:
    """The pins of a requirements file by (package, marker)."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and line[0].isalpha():
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            found[requirement.name, str(requirement.marker or "")] = Version(specifier.version)
    return found


def run_without_detectron2(prepare: str) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages, hence no Detectron2, whatever is installed here.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{prepare}\nimport ssim_kd"
    return subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, check=False
    )


def test_import_without_detectron2_names_both_ways_to_install() -> None:
    result = run_without_detectron2("")
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "INSTALL.md" in result.stderr
    assert "pip install ./third_party/detectron2" in result.stderr


def test_a_folder_named_detectron2_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    result = run_without_detectron2(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert "ssim_kd needs Detectron2, which is not installed" in result.stderr


def test_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ssim_kd.__version__)
    assert setup_cfg()["metadata"]["version"] == "attr: ssim_kd.__version__"


@pytest.mark.parametrize("version", ["0.6", "0.6+cu118", "0.7"])
def test_an_official_detectron2_satisfies_the_requirement(version: str) -> None:
    assert install_requires()["detectron2"].specifier.contains(version)


@pytest.mark.parametrize(
    ("version", "fits"), [("2.7.1", False), ("2.8.0", True), ("2.8.0+cu128", True), ("3.0", True)]
)
def test_torch_range(version: str, fits: bool) -> None:
    assert install_requires()["torch"].specifier.contains(version) is fits


def test_no_range_has_an_upper_end_or_an_address() -> None:
    # An upper end would replace what a cluster has installed.
    for requirement in install_requires().values():
        assert requirement.url is None, requirement
        assert {s.operator for s in requirement.specifier} <= {">="}, requirement


def test_opencv_is_not_required() -> None:
    # Any of its packages would be installed over the one that is there; see setup.cfg.
    assert not [name for name in install_requires() if "opencv" in name]


def test_packages_of_the_digits_are_an_extra() -> None:
    names = {"scikit-learn", "scipy", "tqdm"}
    assert set(extra("digits")) == names and not names & set(install_requires())
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "-e .[digits]" in lines


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_name_no_host(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    bad = [line for line in lines if "://" in line or "index-url" in line or "find-links" in line]
    assert not bad


def test_requirements_pin_what_setup_cfg_asks_for() -> None:
    pinned = pins("requirements.txt")
    names = {name for name, _ in pinned}
    for requirement in [*install_requires().values(), *extra("digits").values()]:
        if requirement.name == "detectron2":  # ./third_party/detectron2
            continue
        assert requirement.name in names, f"{requirement.name} is not pinned"
        for (name, _), version in pinned.items():
            if name == requirement.name:
                assert requirement.specifier.contains(version), (name, version)


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_types_are_shipped() -> None:
    assert (ROOT / "ssim_kd" / "py.typed").is_file()
    assert "py.typed" in setup_cfg()["options.package_data"]["ssim_kd"]
