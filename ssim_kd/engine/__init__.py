"""Training and evaluation."""

from ..command_line import argument_parser, quiet_libraries

quiet_libraries()  # before the imports below, which cause the first warnings

from ..trackers import MLflowWriter, WandbWriter  # noqa: E402
from .defaults import main, run  # noqa: E402
from .distill import distill  # noqa: E402
from .preflight import load_config  # noqa: E402
from .trainer import DistillTrainer  # noqa: E402

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
