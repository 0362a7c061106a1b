"""What the package declares, and what it says without Detectron2."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from collections.abc import Iterable
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


def run_without_detectron2(code: str, *, paths: Iterable[str] = ()) -> subprocess.CompletedProcess:
    """Run code that finds no Detectron2 and fvcore, wherever they are installed."""
    hide = f"""
import importlib.machinery, sys
sys.path[:0] = {[str(ROOT), *paths]!r}
hidden = ("detectron2", "fvcore", "iopath", "pycocotools")
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    spec = find(name, path, target)
    named = name.split(".")[0] in hidden and spec is not None and spec.origin is not None
    return None if named else spec
for finder in sys.meta_path:
    if getattr(finder, "__name__", "") == "PathFinder":
        finder.find_spec = find_spec
    elif "editable" in getattr(finder, "__module__", getattr(finder, "__name__", "")):
        sys.meta_path.remove(finder)
"""
    return subprocess.run(
        [sys.executable, "-E", "-c", hide + code], capture_output=True, text=True, check=False
    )


LOSSES_ALONE = """
import sys, torch
import ssim_kd
from ssim_kd.losses import lp_loss, pyramid_ssim_loss, ssim_loss
x = torch.rand(1, 2, 16, 16)
assert float(ssim_loss(x, x)) < 1e-6 and float(lp_loss(x, x, p=1)) == 0
print("modules", sorted(set(hidden) & set(sys.modules)))
print("version", ssim_kd.__version__, "names", "DistilledDetector" in dir(ssim_kd))
"""


def test_losses_need_no_detectron2() -> None:
    result = run_without_detectron2(LOSSES_ALONE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["modules []", f"version {ssim_kd.__version__} names True"]


@pytest.mark.parametrize(
    "code", ["import ssim_kd; ssim_kd.DistilledDetector", "from ssim_kd import add_distill_config"]
)
def test_a_public_name_without_detectron2_raises_both_ways_to_install(code: str) -> None:
    result = run_without_detectron2(code)
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "INSTALL.md" in result.stderr
    assert "pip install ./third_party/detectron2" in result.stderr


def test_a_folder_named_detectron2_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    result = run_without_detectron2(
        "import ssim_kd; ssim_kd.DistilledDetector", paths=[str(tmp_path)]
    )
    assert "ssim_kd needs Detectron2, which is not installed" in result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ssim_kd.no_such_name


def test_every_public_name_is_there() -> None:
    assert set(ssim_kd.__all__) == set(dir(ssim_kd))
    for name in ssim_kd.__all__:
        assert getattr(ssim_kd, name) is not None


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
    assert "py.typed" in (ROOT / "setup.py").read_text()


def test_make_leaves_the_environment_of_another_checkout(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho /another/checkout; echo $@ >> {tmp_path}/calls\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "-C", str(ROOT), "setup", f"VENV={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode and "/another/checkout" in done.stderr
    assert "pip" not in (tmp_path / "calls").read_text()
