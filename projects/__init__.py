"""Compared methods, one folder each. Importing a project registers its distiller."""

import importlib
from pathlib import Path

from detectron2.config import CfgNode


def project_names() -> list[str]:
    """The folders beside this file that are packages."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))


def add_project_configs(cfg: CfgNode) -> None:
    """Import every project and let each add its config keys, in place."""
    for name in project_names():
        importlib.import_module(f"{__name__}.{name}").add_config(cfg)
