"""Packages of ssim_kd: its own, the methods of projects/ and the configs; the rest is in setup.cfg.

As Detectron2 installs its projects: ``projects/PKD/pkd`` becomes ``ssim_kd.projects.pkd``. A new
project needs no entry anywhere.
"""

from pathlib import Path

from setuptools import find_packages, setup

places = {"ssim_kd.configs": "configs"}
for project in sorted(Path("projects").iterdir()):
    for package in project.glob("*/__init__.py"):
        places[f"ssim_kd.projects.{package.parent.name}"] = str(package.parent)
    if (project / "configs").is_dir():
        # Beside the methods, so that "../../../configs" is the folder above here as well.
        places[f"ssim_kd.projects.{project.name}.configs"] = str(project / "configs")

configs = {name: ["**/*.yaml", "**/*.py"] for name in places if name.endswith("configs")}
setup(
    packages=[*find_packages(include=["ssim_kd*"]), *places],
    package_dir=places,
    package_data={
        "ssim_kd": ["py.typed", "ops/cpu/*.c", "ops/cpu/*.h"],
        "ssim_kd.reporting": ["*.html", "*.css"],
        **configs,
    },
)
