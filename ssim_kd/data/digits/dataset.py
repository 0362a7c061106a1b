"""Registers the digits, and makes them on first use: ``register_digits(cfg)``, ``ensure_digits``.

``register_digits`` announces ``digits_train``, ``digits_val`` and ``digits_test``; nothing is drawn
before one of them is loaded, or :func:`ensure_digits` called.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from ...locks import lock
from .scene import CLASSES, SPLITS, DigitsSplit, splits_from_config

logger = logging.getLogger(__name__)

DIGITS_NAMES = tuple(f"digits_{split}" for split in SPLITS)

# The registered sets of this process, by name.
_REGISTERED: dict[str, DigitsSplit] = {}


def register_digits(cfg: CfgNode) -> None:
    """Register the three splits of the digits as ``cfg.DATASETS.DIGITS`` says.

    Nothing is drawn yet. Registering again with other parameters replaces the sets.

    Raises:
        ValueError: a value of ``DATASETS.DIGITS`` is out of range, or another package has
            registered a data set by one of these names.
    """
    for name, split in zip(DIGITS_NAMES, splits_from_config(cfg), strict=True):
        if _REGISTERED.get(name) == split and name in DatasetCatalog:
            continue
        if name in DatasetCatalog and name not in _REGISTERED:
            raise ValueError(f"The data set name {name!r} is taken: something else registered it.")
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(name, None)
        _REGISTERED[name] = split
        DatasetCatalog.register(name, _Loader(name, split))
        MetadataCatalog.get(name).set(
            json_file=str(split.json_file),
            image_root=str(split.folder),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
        )


def ensure_digits(names: Sequence[str]) -> None:
    """Make those of the named data sets that are registered digits sets; ignore other names.

    ``COCOEvaluator`` reads the json file as soon as it is built, so call this before it if the
    set has not been loaded yet.
    """
    for name in names:
        if name in _REGISTERED:
            make_split(_REGISTERED[name])


@dataclass(frozen=True)
class _Loader:
    name: str
    split: DigitsSplit

    def __call__(self) -> list[dict[str, Any]]:
        make_split(self.split)
        json_file, folder = str(self.split.json_file), str(self.split.folder)
        dicts: list[dict[str, Any]] = load_coco_json(json_file, folder, self.name)
        return dicts


def make_split(split: DigitsSplit) -> None:
    """Draw a split into its folder, unless it is there: ``000000.png`` ... ``annotations.json``.

    The folder appears at once when it is complete, so it never holds half a split. Other processes
    that want the same split wait on a lock which the operating system frees when its holder dies.

    Raises:
        ImportError: a package of the extra ``digits`` is missing.
        OSError: the folder cannot be written (no permission, disk full). What was drawn so far is
            removed by the next attempt.
    """
    folder = split.folder
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.parent / f".{folder.name}.lock", wait=True):
        if folder.exists():  # made while we waited
            return
        # We hold the lock: whatever lies here is of a process that was killed.
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _draw_into(unfinished, split)
        os.replace(unfinished, folder)
        _sync(folder.parent)
    logger.info("Made %d images of %s in %s", split.num_images, split.split, folder)


def _draw_into(folder: Path, digits_split: DigitsSplit) -> None:
    try:  # not required by the package: only the digits need these
        from tqdm import tqdm

        from .renderer import render_image
    except ImportError as error:
        missing = str(error.name).split(".")[0]
        raise ImportError(
            f"The digits data set needs {missing}, which is not installed: "
            "pip install 'ssim_kd[digits]'.",
            name=missing,
        ) from error
    scene, split = digits_split.scene, digits_split.split
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(digits_split.num_images), desc=f"Drawing digits_{split}", unit="img"):
        picture, digits = render_image(scene, split, index)
        name = f"{index:06d}.png"
        Image.fromarray(picture).save(folder / name, compress_level=1)
        size = {"height": scene.image_size, "width": scene.image_size}
        images.append({"id": index + 1, "file_name": name, **size})
        for digit in digits:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": digit.label + 1,
                    "bbox": list(digit.box),
                    "area": digit.area,
                    "iscrowd": 0,
                    "glyph": digit.glyph,
                }
            )
    content = {
        "info": {"description": f"digits_{split}", "glyphs": "scikit-learn load_digits"},
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "images": images,
        "annotations": annotations,
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    for path in sorted(folder.iterdir()):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
