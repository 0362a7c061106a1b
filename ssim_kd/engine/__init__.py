"""Training and evaluation."""

import sys

from ..command_line import argument_parser, quiet_libraries

quiet_libraries()  # before the imports below, which cause the first warnings

from ..trackers import MLflowWriter, WandbWriter  # noqa: E402
from .defaults import main, run  # noqa: E402
from .distill import distill  # noqa: E402
from .preflight import load_config  # noqa: E402
from .trainer import DistillTrainer  # noqa: E402

# Their former place, which saved LazyConfigs may name.
trackers = sys.modules["ssim_kd.engine.trackers"] = sys.modules["ssim_kd.trackers"]

__all__ = [
    "DistillTrainer",
    "MLflowWriter",
    "WandbWriter",
    "argument_parser",
    "distill",
    "load_config",
    "main",
    "run",
]
