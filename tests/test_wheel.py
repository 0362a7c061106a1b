"""The wheel: what it holds, and distillation by it, without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.engine.runs import ROOT, World


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the package needs, by the setuptools that is installed."""
    source = tmp_path_factory.mktemp("source")
    for name in ("ssim_kd", "projects", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "tests")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*command, "-w", str(source / "dist"), "."], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_wheel_holds_projects_and_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for project in (p for p in (ROOT / "projects").iterdir() if (p / "README.md").is_file()):
        package = next(project.glob("*/__init__.py")).parent.name
        assert f"ssim_kd/projects/{package}/distiller.py" in names, project.name
        for config in (project / "configs").rglob("*.yaml"):
            assert f"ssim_kd/{config.relative_to(ROOT)}" in names
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert f"ssim_kd/{config.relative_to(ROOT)}" in names
    assert {"ssim_kd/py.typed", "ssim_kd/ops/cpu/ssim.c"} <= names
    for module in ("__main__", "command_line", "doctor", "sheets", "export/student"):
        assert f"ssim_kd/{module}.py" in names
    assert "ssim_kd/comparing/compare.py" in names
    assert {f"ssim_kd/reporting/report.{kind}" for kind in ("html", "css")} <= names
    assert not [n for n in names if "test" in n]
    (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
    assert b"ssim-kd = ssim_kd.__main__:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_installed_wheel_distils(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    # As pip does with a pure Python wheel.
    zipfile.ZipFile(wheel).extractall(site)
    world = World(tmp_path)
    short = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    opts = ("MODEL.DISTILL.NAME", "PKDDistiller")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    # Then a config that is shipped, by its path below configs, of a method's too.
    code = (
        "import sys; from ssim_kd.__main__ import main; main(sys.argv[1:]); "
        "import ssim_kd; from ssim_kd.engine import argument_parser, load_config; "
        "from ssim_kd.projects import add_project_configs; "
        "a = argument_parser().parse_args(['--config-file', "
        "'PKD/pkd_retinanet_R_50_FPN_1x.yaml']); "
        "print(ssim_kd.__file__, load_config(a, add_project_configs).MODEL.DISTILL.NAME)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *world.arguments(tmp_path / "run", *short, *opts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**env, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "distill/pkd_p3" in (tmp_path / "run" / "metrics.json").read_text()
    assert str(site) in done.stdout and done.stdout.split()[-1] == "PKDDistiller"
