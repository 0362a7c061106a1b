"""Data: COCO sets from the config, the embedded digits, checks, loaders."""

from detectron2.config import CfgNode

from .coco import register_coco
from .digits import ensure_digits, register_digits
from .json_file import count_classes
from .mapper import CheckedMapper, UnreadableImageError
from .needs import Needs
from .records import once
from .resumable_loader import TrainLoader
from .train_loader import build_train_loader, drawn_seed
from .training_sets import count_images, train_records
from .validation import DatasetSummary, check_datasets, class_names
from .workers import EvaluationLoader, build_evaluation_loader

__all__ = [
    "CheckedMapper",
    "DatasetSummary",
    "EvaluationLoader",
    "Needs",
    "TrainLoader",
    "UnreadableImageError",
    "build_evaluation_loader",
    "build_train_loader",
    "check_datasets",
    "class_names",
    "count_classes",
    "count_images",
    "drawn_seed",
    "ensure_digits",
    "once",
    "register_coco",
    "register_datasets",
    "register_digits",
    "train_records",
]


def register_datasets(cfg: CfgNode) -> None:
    """Register every data set that the config describes. Nothing is read or drawn yet."""
    register_digits(cfg)
    register_coco(cfg)
