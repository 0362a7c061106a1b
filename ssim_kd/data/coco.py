"""Registers data sets in COCO's format from the config alone: ``DATASETS.REGISTER_COCO``."""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

# What this process has registered: name -> (json file, image folder).
_REGISTERED: dict[str, tuple[str, str]] = {}


def register_coco(cfg: CfgNode) -> None:
    """Register every entry of ``cfg.DATASETS.REGISTER_COCO``: [name, json file, image folder].

    Nothing is read yet. An entry that is registered already is left alone; one that was registered
    here with other paths is replaced.

    Raises:
        ValueError: an entry is malformed, a name appears twice with different paths, or another
            package has registered the name.
    """
    wanted: dict[str, tuple[str, str]] = {}
    for position, entry in enumerate(cfg.DATASETS.REGISTER_COCO):
        name, json_file, image_root = _parse(position, entry)
        if wanted.setdefault(name, (json_file, image_root)) != (json_file, image_root):
            raise ValueError(
                f"DATASETS.REGISTER_COCO names {name!r} twice, with different paths: "
                f"{wanted[name]} and {(json_file, image_root)}. Give each data set its own name."
            )
    for name, paths in wanted.items():
        if name in DatasetCatalog:
            if _REGISTERED.get(name) == paths:
                continue
            if name not in _REGISTERED:
                raise ValueError(
                    f"DATASETS.REGISTER_COCO: the name {name!r} is taken by a data set that "
                    "Detectron2 or another package has registered. Choose another name."
                )
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name, None)
        register_coco_instances(name, {}, *paths)
        _REGISTERED[name] = paths


def is_registered_here(name: str) -> bool:
    """Whether the data set comes from ``DATASETS.REGISTER_COCO``."""
    return name in _REGISTERED


def _parse(position: int, entry: Any) -> tuple[str, str, str]:
    valid = (
        isinstance(entry, Sequence)
        and not isinstance(entry, str)
        and len(entry) == 3
        and all(isinstance(part, str) and part for part in entry)
    )
    if not valid:
        raise ValueError(
            f"DATASETS.REGISTER_COCO[{position}] is {entry!r}: expected "
            "[name, json file, image folder], three non-empty strings."
        )
    name, json_file, image_root = entry
    return name, os.path.expanduser(json_file), os.path.expanduser(image_root)
