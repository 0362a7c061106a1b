"""Checks of the data sets of a config before anything is built: ``check_datasets``."""

from .classes import num_classes, num_classes_key
from .datasets import DatasetSummary, check_datasets

__all__ = ["DatasetSummary", "check_datasets", "num_classes", "num_classes_key"]
