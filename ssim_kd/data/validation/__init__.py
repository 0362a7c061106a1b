"""Checks of the data sets of a config before anything is built: ``check_datasets``."""

from .datasets import check_datasets, check_records_for_mapper
from .findings import DatasetSummary, class_names

__all__ = ["DatasetSummary", "check_datasets", "check_records_for_mapper", "class_names"]
