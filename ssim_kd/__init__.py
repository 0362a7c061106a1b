"""Knowledge distillation of object detectors: an extension of Detectron2.

from ssim_kd import add_distill_config        # config keys; registers DistilledDetector
from ssim_kd.losses import ssim_loss          # the losses; Detectron2 is not needed
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import add_distill_config, student_config
    from .engine import (
        DistillTrainer,
        MLflowWriter,
        WandbWriter,
        argument_parser,
        distill,
        run,
    )
    from .modeling import (
        DISTILLER_REGISTRY,
        DistillBatch,
        DistilledDetector,
        Distiller,
        FrozenTeacher,
        LevelMaps,
        LpDistiller,
        PyramidDistiller,
        SSIMDistiller,
        Tap,
    )

__version__ = "0.2.0"

_MODULES = {
    "config": ("add_distill_config", "student_config"),
    "engine": (
        "DistillTrainer",
        "MLflowWriter",
        "WandbWriter",
        "argument_parser",
        "distill",
        "run",
    ),
    "modeling": (
        "DISTILLER_REGISTRY",
        "DistillBatch",
        "DistilledDetector",
        "Distiller",
        "FrozenTeacher",
        "LevelMaps",
        "LpDistiller",
        "PyramidDistiller",
        "SSIMDistiller",
        "Tap",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DISTILLER_REGISTRY",
    "DistillBatch",
    "DistillTrainer",
    "DistilledDetector",
    "Distiller",
    "FrozenTeacher",
    "LevelMaps",
    "LpDistiller",
    "MLflowWriter",
    "PyramidDistiller",
    "SSIMDistiller",
    "Tap",
    "WandbWriter",
    "__version__",
    "add_distill_config",
    "argument_parser",
    "distill",
    "run",
    "student_config",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the losses work without Detectron2.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _require_detectron2()
    # Registers the meta-architecture, whichever name was asked for.
    importlib.import_module(f"{__name__}.modeling")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _require_detectron2() -> None:
    spec = importlib.util.find_spec("detectron2")
    # A folder that is merely named detectron2 (a checkout next to the working directory) is found
    # too, without an origin.
    if spec is None or spec.origin is None:
        raise ImportError(
            "ssim_kd needs Detectron2, which is not installed; ssim_kd.losses works without it. "
            "Either build it as its INSTALL.md says (0.6 or the main branch, with compiled "
            "operators), or install the pure-Python build of 0.6 from a checkout of ssim_kd: "
            "pip install ./third_party/detectron2",
            name="detectron2",
        )
