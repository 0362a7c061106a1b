"""Training and evaluation."""

from .launch import argument_parser
from .main import load_config, main, run
from .trainer import DistillTrainer

__all__ = ["DistillTrainer", "argument_parser", "load_config", "main", "run"]
