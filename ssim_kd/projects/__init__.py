"""Compared methods, one package each. Importing one registers its distiller.

    from ssim_kd.projects import add_project_configs         # all methods
    from ssim_kd.projects.pkd import PKDDistiller            # one

In a checkout they lie under ``projects/<Method>/<method>``; an installed ssim_kd has them here.
"""

import importlib
import importlib.metadata
import pkgutil
from pathlib import Path

from detectron2.config import CfgNode

_CHECKOUT = Path(__file__).parents[2] / "projects"
if _CHECKOUT.is_dir():
    __path__ += [str(folder) for folder in sorted(_CHECKOUT.iterdir()) if folder.is_dir()]


def project_names() -> list[str]:
    """The names of the packages of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def add_project_configs(cfg: CfgNode) -> None:
    """Import every project and let each add its config keys, in place.

    Those of other packages are modules that they name as entry points of the group
    "ssim_kd.methods". A project without keys has no ``add_config``.
    """
    modules = [importlib.import_module(f"{__name__}.{name}") for name in project_names()]
    modules += [entry.load() for entry in importlib.metadata.entry_points(group="ssim_kd.methods")]
    for module in modules:
        if hasattr(module, "add_config"):
            module.add_config(cfg)
