"""``--data``: the data sets and the classes that one YAML file describes."""

import json
import os
import reprlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import count_classes, once, register_coco
from ..data.coco import note_source
from ..data.validation import num_classes_key
from ..writing import folder_of, is_remote

_SET_KEYS = ("json", "images")
_SPLITS = ("train", "val", "test")
# What a message shows of a file.
_OUTLINE = reprlib.Repr()
_OUTLINE.maxlevel, _OUTLINE.maxdict, _OUTLINE.maxstring, _OUTLINE.maxother = 2, 8, 60, 60


@dataclass(frozen=True)
class DataFile:
    """What a data file describes.

    Attributes:
        entries: [name, json file, image folder] by split: "train", and perhaps "val" and "test".
        classes: number of categories of "train".
    """

    entries: dict[str, list[str]]
    classes: int

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the sets to evaluate on."""
        return tuple(self.entries[split][0] for split in ("val", "test") if split in self.entries)


def read_data_file(path: str) -> DataFile:
    """Read a file of ``--data``, with paths relative to its folder. Every process must call it.

    It has the form::

        name: parts                                    # optional; by default the file's own
        train: {json: train.json, images: train}
        val: {json: val.json, images: val}
        test: {json: test.json, images: test}          # optional

    Args:
        path: of the file.

    Raises:
        ValueError: a file that is not readable or not of this form.
    """
    sets = _read_sets(path)
    folder = folder_of(path if is_remote(path) else os.path.abspath(path))
    name = str(sets.pop("name", os.path.splitext(os.path.basename(path))[0]))
    entries = {
        split: [f"{name}_{split}", *(_place(sets[split][k], folder) for k in _SET_KEYS)]
        for split in sets
    }
    for split, (entry, json_file, _) in entries.items():
        note_source(entry, json_file, f"entry {split!r} of {path}")
    try:
        classes = once(lambda: count_classes(entries["train"][1]))
    except ValueError as error:
        raise ValueError(f"--data {path}, entry 'train': {error}") from error
    return DataFile(entries, classes)


def apply_data(cfg: CfgNode, path: str, own: Collection[str]) -> list[str]:
    """Set the data sets and the number of classes of a data file in a YAML config, in place.

    Args:
        cfg: changed in place.
        path: of the file.
        own: keys that the user's config file sets; classes among them must be the data's.

    Returns:
        what was set, a line each.

    Raises:
        ValueError: see :func:`read_data_file`; or other classes.
    """
    data = read_data_file(path)
    entries = list(data.entries.values())
    registered = [entry for entry in cfg.DATASETS.REGISTER_COCO if entry not in entries]
    cfg.DATASETS.REGISTER_COCO = [*registered, *entries]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data.entries["train"][0],), data.tests
    read = num_classes_key(cfg) or "MODEL.ROI_HEADS.NUM_CLASSES"
    for node, key in (
        (cfg.MODEL.ROI_HEADS, "MODEL.ROI_HEADS.NUM_CLASSES"),
        (cfg.MODEL.RETINANET, "MODEL.RETINANET.NUM_CLASSES"),
    ):
        if key == read and key in own and data.classes != node.NUM_CLASSES:
            raise ValueError(
                f"{key} is {node.NUM_CLASSES} in the config file, but {data.entries['train'][1]} "
                f"has {data.classes} categories; expected the same. Leave the key out of the file."
            )
        node.NUM_CLASSES = data.classes
    return [f"--data {path}: {data.classes} classes, {cfg.DATASETS.TRAIN} and {data.tests}"]


def apply_lazy_data(cfg: DictConfig, path: str, by_hand: Collection[str]) -> list[str]:
    """Register the data sets of a data file, and set them and their classes in a LazyConfig.

    A LazyConfig is evaluated on one set: "val", else "test". The classes are those of the student:
    of ``model.roi_heads`` (R-CNNs, ViTDet), else of ``model`` (RetinaNet, FCOS), and of the heads
    below with as many classes. A teacher keeps those of its weights.

    Args:
        cfg: changed in place.
        path: of the file.
        by_hand: keys of overrides, which stay as they are.

    Returns:
        what was set, a line each.

    Raises:
        ValueError: see :func:`read_data_file`; or a LazyConfig with other parts than the zoo's.
    """
    data = read_data_file(path)
    register_coco(CfgNode({"DATASETS": {"REGISTER_COCO": list(data.entries.values())}}))
    loaders, names = cfg.dataloader, {"train": data.entries["train"][0]}
    if data.tests and "test" in loaders:
        names["test"] = data.tests[0]
    elif "evaluator" in loaders:
        del loaders.evaluator
    for split, name in names.items():
        key = f"dataloader.{split}.dataset.names"
        if OmegaConf.select(cfg, key) is None:
            raise ValueError(
                f"--data {path}: the LazyConfig has no {key}; expected it there, as in the model "
                "zoo. Register the sets and name them in the .py file instead."
            )
        if key not in by_hand:
            OmegaConf.update(cfg, key, name)
    evaluator: Any = loaders.get("evaluator") or {}
    if "dataset_name" in evaluator and "dataloader.evaluator.dataset_name" not in by_hand:
        evaluator.dataset_name = "${..test.dataset.names}"
    place = "model.student" if "student" in cfg.model else "model"
    if OmegaConf.select(cfg, f"{place}.num_classes") is None:
        place += ".roi_heads"
    key, node = f"{place}.num_classes", OmegaConf.select(cfg, place)
    if OmegaConf.select(cfg, key) is None:
        raise ValueError(
            f"--data {path}: the LazyConfig has neither model.num_classes nor {key}; expected a "
            "detector like those of the model zoo. Register the sets, name them in "
            "dataloader.train.dataset.names and dataloader.test.dataset.names, and set the "
            f"{data.classes} classes of the model in the .py file instead."
        )
    if key not in by_hand:
        _replace_classes(node, node.num_classes, data.classes)
    shown = names.get("test", "no set to evaluate on")
    return [f"--data {path}: {key} {node.num_classes}, {names['train']} and {shown}"]


def _replace_classes(node: Any, old: int, new: int) -> None:
    """Replace the class count of a model and of all parts of it that do not take it from there."""
    if isinstance(node, DictConfig):
        if not OmegaConf.is_interpolation(node, "num_classes") and node.get("num_classes") == old:
            node.num_classes = new
        for key in map(str, node):
            if not OmegaConf.is_interpolation(node, key):
                _replace_classes(node[key], old, new)
    elif isinstance(node, ListConfig):
        for part in node:
            _replace_classes(part, old, new)


def _place(path: str, folder: str) -> str:
    path = os.path.expanduser(path)
    return path if is_remote(path) else os.path.join(folder, path)


def _read_sets(path: str) -> dict[str, Any]:
    try:
        with PathManager.open(path, "rb") as file:
            # YAML takes minutes to read the json of a big set, which may be given by mistake.
            sets = json.load(file) if path.endswith(".json") else yaml.safe_load(file)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"DATASETS.DATA_FILE (--data) {path} is not readable: {error}") from error
    valid = (
        isinstance(sets, dict)
        and "train" in sets
        and set(sets) <= {"name", *_SPLITS}
        and all(
            isinstance(sets[s], dict)
            and set(sets[s]) == set(_SET_KEYS)
            and all(isinstance(value, str) for value in sets[s].values())
            for s in _SPLITS
            if s in sets
        )
    )
    if not valid:
        # A file that is given by mistake may hold a million values.
        raise ValueError(
            f"DATASETS.DATA_FILE (--data) {path} holds {_OUTLINE.repr(sets)}; expected a YAML file "
            "with 'train', 'val' and 'test' (train at least), each {json: FILE, images: FOLDER}, "
            "and 'name'."
        )
    return dict(sets)
