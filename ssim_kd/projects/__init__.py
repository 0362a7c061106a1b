"""Compared methods, one package each. Importing one registers its distiller.

    from ssim_kd.projects import add_project_configs         # all methods
    from ssim_kd.projects.pkd import PKDDistiller            # one

In a checkout they lie under ``projects/<Method>/<method>``; an installed ssim_kd has them here.
"""

import importlib
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
    """Import every project and let each add its config keys, in place."""
    for name in project_names():
        importlib.import_module(f"{__name__}.{name}").add_config(cfg)
