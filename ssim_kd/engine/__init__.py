"""Training and evaluation."""

from .defaults import load_config, main, run
from .launch import argument_parser
from .trainer import DistillTrainer

__all__ = ["DistillTrainer", "argument_parser", "load_config", "main", "run"]
