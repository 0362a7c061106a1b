"""``--data``: the data sets and the classes that one YAML file describes."""

import json
import os
import reprlib
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from ..data import count_classes, once
from ..data.coco import note_source
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
