"""Checks the data sets of a config before anything is built: ``check_datasets(cfg, train=...)``."""

import contextlib
import difflib
import gc
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..coco import is_registered_here
from ..digits import ensure_digits
from ..mapper import refuse_deep
from .classes import check_classes, check_same_classes, learns_masks
from .coco_file import Findings, inspect_coco

ZERO_AREA_POLICIES = ("error", "drop")
# Types of data sets that Detectron2 reads and scores as COCO's; LVIS has keys of its own.
_COCO_KINDS = ("coco", "coco_panoptic_seg")


@dataclass(frozen=True)
class DatasetSummary:
    """What a checked data set holds. Its text is one line for the log.

    ``findings`` is None for a set that is not kept in a json file of COCO's format: then only its
    being registered, and its folder, were checked.
    """

    key: str
    name: str
    findings: Findings | None

    def __str__(self) -> str:
        found = self.findings
        if found is None:
            return f"{self.key}: {self.name}: registered; its content is not checked"
        text = (
            f"{self.key}: {self.name}: {found.images} images, {found.annotations} annotations, "
            f"{found.categories} categories"
        )
        if not found.scored:
            return f"{text}; no ground truth: predictions are written, not scored"
        if found.empty_images:
            text += f"; {found.empty_images} images without annotations"
        if found.clipped:
            text += f"; {found.clipped} boxes clipped to their images"
        if found.zero_area:
            fate = "left out" if self.key == "DATASETS.TRAIN" else "kept in the evaluation"
            text += f"; {found.zero_area} boxes of zero area {fate}"
        return text


def check_datasets(cfg: CfgNode, *, train: bool) -> list[DatasetSummary]:
    """Check that every data set of the config can be used. It reads each json file once.

    The embedded digits are made if they are not there. Run it on one rank (it may read 500 MB).

    Args:
        cfg: its sets must be registered (``register_datasets(cfg)``).
        train: True checks ``DATASETS.TRAIN`` and ``DATASETS.TEST``, False the latter alone.

    Returns:
        a summary of each set, in order; its ``str`` is one line.

    Raises:
        FileNotFoundError: a json file, an image folder or the first image is not there.
        ValueError: anything else. Both name the key, the set, the file and what to do.
    """
    policy = cfg.DATASETS.ZERO_AREA_BOXES
    if policy not in ZERO_AREA_POLICIES:
        raise ValueError(
            f"DATASETS.ZERO_AREA_BOXES is {policy!r}: expected one of "
            f"{', '.join(ZERO_AREA_POLICIES)}."
        )
    keys = ("TRAIN", "TEST") if train else ("TEST",)
    if train and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: expected at least one data set name.")
    summaries: list[DatasetSummary] = []
    known: dict[str, tuple[Findings | None, list[str]]] = {}
    for key in keys:
        names = cfg.DATASETS[key]
        if isinstance(names, str):
            raise ValueError(f"DATASETS.{key} is {names!r}: expected a list: ({names!r},).")
        for name in names:
            where = f"DATASETS.{key}: data set {name!r}"
            if name not in known:
                known[name] = _check_one(where, name, training=key == "TRAIN")
            found, classes = known[name]
            if found is not None:
                _check_findings(cfg, where, name, found, training=key == "TRAIN")
                check_classes(cfg, where, classes)
            summaries.append(DatasetSummary(f"DATASETS.{key}", name, found))
    check_same_classes(cfg, {name: classes for name, (found, classes) in known.items() if found})
    return summaries


def _check_one(where: str, name: str, *, training: bool) -> tuple[Findings | None, list[str]]:
    """Check one set's files, and return its findings and class names."""
    if name not in DatasetCatalog:
        registered = sorted(DatasetCatalog.keys())
        close = difflib.get_close_matches(name, registered, n=5) or registered
        raise ValueError(
            f"{where} is not registered. Close to it: {', '.join(close)}. Data in COCO's format is "
            "registered by DATASETS.REGISTER_COCO: [[name, json file, image folder], ...]."
        )
    ensure_digits([name])
    meta = MetadataCatalog.get(name)
    json_file, image_root = meta.get("json_file"), meta.get("image_root")
    if not json_file:
        folder = image_root or meta.get("dirname") or meta.get("image_dir")
        if folder and not PathManager.isdir(folder):
            raise FileNotFoundError(f"{where}: the folder {folder} does not exist. {_advice(name)}")
        return None, []
    content = _read_json(where, name, json_file, training=training)
    if not image_root or not PathManager.isdir(image_root):
        raise FileNotFoundError(
            f"{where}: the image folder {image_root} does not exist. {_advice(name)}"
        )
    # Detectron2 admits these files' double ids as well.
    kind = meta.get("evaluator_type", "coco")
    found = inspect_coco(
        content, unique_annotations="minival" not in json_file, coco=kind in _COCO_KINDS
    )
    if found.problems:
        raise ValueError(f"{where}: {json_file}: {'; '.join(found.problems)}. Correct the file.")
    first = content["images"][0].get("file_name") if content["images"] else None
    if first and not PathManager.isfile(os.path.join(image_root, first)):
        raise FileNotFoundError(
            f"{where}: {json_file} names the image {first}, which is not in {image_root}. "
            "Expected every file_name relative to the image folder."
        )
    if first:
        try:
            refuse_deep(os.path.join(image_root, first))
        except OSError as error:
            raise ValueError(f"{where}: the first image, {first}: {error}.") from error
    return found, [str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])]


def _read_json(where: str, name: str, json_file: str, *, training: bool) -> dict[str, Any]:
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(f"{where}: {json_file} does not exist. {_advice(name)}")
    try:
        with PathManager.open(json_file, "rb") as file, _no_garbage_collection():
            content = json.loads(file.read())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        size = os.path.getsize(json_file) if os.path.exists(json_file) else 0
        raise ValueError(
            f"{where}: {json_file} ({size} bytes) is not JSON: {error}. Expected COCO's format; "
            "the download may be cut short."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{where}: {json_file} holds a {type(content).__name__}, not an object with the lists "
            '"images", "annotations" and "categories". Is it a file of results?'
        )
    for key in ("images", "annotations", "categories"):
        if key == "annotations" and key not in content and not training:
            continue  # as COCO's test-dev: predictions are written, not scored
        if not isinstance(content.get(key), list):
            raise ValueError(
                f'{where}: {json_file} has no list "{key}". Expected COCO\'s instances format: '
                '"images", "annotations" and "categories".'
            )
        if not content[key] and key != "annotations":
            raise ValueError(f'{where}: {json_file}: "{key}" is empty. Expected at least one.')
    return content


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no garbage: searching for it would take most time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_findings(
    cfg: CfgNode, where: str, name: str, found: Findings, *, training: bool
) -> None:
    json_file = MetadataCatalog.get(name).json_file
    if not found.annotations and found.scored:
        raise ValueError(f'{where}: {json_file}: "annotations" is empty. Expected at least one.')
    masks = learns_masks(cfg)
    if not training:
        _refuse(where, json_file, [*found.unscorable, *(found.masks_unscorable if masks else ())])
        return
    _refuse(where, json_file, [*found.untrainable, *(found.masks_untrainable if masks else ())])
    if found.zero_area == found.annotations:
        raise ValueError(
            f"{where}: {json_file}: all {found.annotations} boxes have zero area or lie outside "
            f"their images (for example {found.zero_area_examples}). Expected [x, y, width, height]"
            " in pixels."
        )
    if found.zero_area and cfg.DATASETS.ZERO_AREA_BOXES == "error":
        raise ValueError(
            f"{where}: {json_file}: {found.zero_area} boxes have zero area or lie outside their "
            f"images (for example {found.zero_area_examples}). Correct the file, or set "
            'DATASETS.ZERO_AREA_BOXES to "drop" to leave them out.'
        )


def _refuse(where: str, json_file: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{where}: {json_file}: {' '.join(problems)}")


def _advice(name: str) -> str:
    if is_registered_here(name):
        return "Correct the path in DATASETS.REGISTER_COCO (relative to the working directory)."
    root = os.environ.get("DETECTRON2_DATASETS")
    state = f"it is {root!r}" if root else "it is not set, so ./datasets is used"
    return (
        "Detectron2's built-in sets lie under the folder named by the environment variable "
        f"DETECTRON2_DATASETS ({state}): <folder>/coco/annotations/*.json and "
        "<folder>/coco/train2017/*.jpg for COCO. Set it, or link the data there."
    )
