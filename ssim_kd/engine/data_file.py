"""``--data``: the data sets and the classes that one YAML file describes."""

import json
import os
from collections.abc import Collection
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..data import count_classes
from ..data.coco import note_source
from ..data.validation import num_classes_key

#: Keys that hold the number of classes of the detectors of Detectron2.
CLASS_KEYS = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")
_SET_KEYS = ("json", "images")
_SPLITS = ("train", "val", "test")
# Keys that a message shows.
_SHOWN = 8


def apply_data(cfg: CfgNode, path: str, in_file: Collection[str]) -> list[str]:
    """Set the data sets and the number of classes that a data file describes.

    The file, with paths relative to its folder::

        name: parts                                    # optional; by default the file's own
        train: {json: train.json, images: train}
        val: {json: val.json, images: val}
        test: {json: test.json, images: test}          # optional

    Args:
        cfg: changed in place.
        path: of the file.
        in_file: keys that the config file sets; classes that it sets must be the data's.

    Returns:
        what was set, a line each.

    Raises:
        ValueError: a file that is not readable or not of this form, or other classes.
    """
    sets = _read_data_file(path)
    folder = os.path.dirname(os.path.abspath(path))
    name = str(sets.pop("name", os.path.splitext(os.path.basename(path))[0]))
    entries = {
        split: [f"{name}_{split}", *(os.path.join(folder, sets[split][k]) for k in _SET_KEYS)]
        for split in sets
    }
    registered = [entry for entry in cfg.DATASETS.REGISTER_COCO if entry not in entries.values()]
    cfg.DATASETS.REGISTER_COCO = [*registered, *entries.values()]
    cfg.DATASETS.TRAIN = (entries["train"][0],)
    cfg.DATASETS.TEST = tuple(entries[split][0] for split in ("val", "test") if split in entries)
    for split, (entry, json_file, _) in entries.items():
        note_source(entry, json_file, f"entry {split!r} of {path}")
    try:
        classes = count_classes(entries["train"][1])
    except ValueError as error:
        raise ValueError(f"--data {path}, entry 'train': {error}") from error
    read = num_classes_key(cfg) or CLASS_KEYS[0]
    for key in CLASS_KEYS:
        *parents, leaf = key.split(".")
        node = cfg
        for part in parents:
            node = node[part]
        if key == read and key in in_file and node[leaf] != classes:
            raise ValueError(
                f"{key} is {node[leaf]} in the config file, but {entries['train'][1]} has "
                f"{classes} categories; expected the same. Leave the key out of the file."
            )
        node[leaf] = classes
    return [f"--data {path}: {classes} classes, {cfg.DATASETS.TRAIN} and {cfg.DATASETS.TEST}"]


def _read_data_file(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            # YAML takes minutes to read the json of a big set, which may be given by mistake.
            sets = json.load(file) if path.endswith(".json") else yaml.safe_load(file)
    except (OSError, yaml.YAMLError, ValueError) as error:
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
        raise ValueError(
            f"DATASETS.DATA_FILE (--data) {path} holds {_outline(sets)}; expected a YAML file with "
            "'train', 'val' and 'test' (train at least), each {json: FILE, images: FOLDER}, and "
            "'name'."
        )
    return dict(sets)


def _outline(content: Any, depth: int = 1) -> str:
    """The keys of a mapping and of those in it, or the type: a file may hold a million values."""
    if not isinstance(content, dict):
        return "nothing" if content is None else f"a {type(content).__name__}"
    if not depth:
        return f"the keys {_some(content)}"
    return f"the keys {_some(content)}" + "".join(
        f", in {key!r} {_outline(value, depth - 1)}"
        for key, value in list(content.items())[:_SHOWN]
        if key in _SPLITS
    )


def _some(keys: Collection[Any]) -> str:
    shown = ", ".join(str(key)[:40] for key in list(keys)[:_SHOWN])
    return f"{shown}, ..." if len(keys) > _SHOWN else shown
