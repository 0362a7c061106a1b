"""The embedded data set: handwritten digits to detect, made on first use, in COCO's format.

``register_digits(cfg)`` announces ``digits_train``, ``digits_val`` and ``digits_test``; nothing is
drawn before one of them is loaded, or :func:`ensure_digits` called. See ``DATASETS.DIGITS``.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .glyphs import SPLITS
from .make import make_split
from .render import Scene

DIGITS_NAMES = tuple(f"digits_{split}" for split in SPLITS)
CLASSES = tuple("0123456789")
# Raised whenever the renderer draws other pictures than before.
VERSION = 1

# The registered sets of this process, by name.
_REGISTERED: dict[str, "DigitsSplit"] = {}


@dataclass(frozen=True)
class DigitsSplit:
    """One split on disk: what it shows, how many images, and where it lies."""

    scene: Scene
    split: str
    num_images: int
    root: Path

    @property
    def folder(self) -> Path:
        """The split's own folder. Its name and its parent's hold every parameter."""
        scene = self.scene
        name = (
            f"v{VERSION}_seed{scene.seed}_{scene.image_size}px"
            f"_{scene.digits_per_image[0]}-{scene.digits_per_image[1]}digits"
            f"_{scene.digit_size[0]}-{scene.digit_size[1]}px_d{scene.difficulty}"
        )
        return self.root / name / f"{self.split}_{self.num_images}"

    @property
    def json_file(self) -> Path:
        """The annotations in COCO's format."""
        return self.folder / "annotations.json"

    def ensure(self) -> None:
        """Make the split if it is not there. One process does; others wait for it."""
        make_split(self.scene, self.split, self.num_images, self.folder, CLASSES)


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

    ``COCOEvaluator`` reads the json file as soon as it is built, so call this before it where the
    set has not been loaded yet.
    """
    for name in names:
        if name in _REGISTERED:
            _REGISTERED[name].ensure()


@dataclass(frozen=True)
class _Loader:
    name: str
    split: DigitsSplit

    def __call__(self) -> list[dict[str, Any]]:
        self.split.ensure()
        json_file, folder = str(self.split.json_file), str(self.split.folder)
        dicts: list[dict[str, Any]] = load_coco_json(json_file, folder, self.name)
        return dicts


def splits_from_config(cfg: CfgNode) -> list[DigitsSplit]:
    """Read ``cfg.DATASETS.DIGITS`` and return the train, val and test splits.

    Raises:
        ValueError: names the key, its value and what is expected.
    """
    node = cfg.DATASETS.DIGITS
    low, high = _pair(node, "DIGITS_PER_IMAGE")
    if not (_whole(low) and _whole(high) and 1 <= low <= high):
        raise _error(node, "DIGITS_PER_IMAGE", "two integers, 1 <= least <= greatest")
    small, large = _pair(node, "DIGIT_SIZE")
    if not (_whole(node.IMAGE_SIZE) and 16 <= node.IMAGE_SIZE <= 4096):
        raise _error(node, "IMAGE_SIZE", "an integer from 16 to 4096 (pixels)")
    if not 8 <= small <= large <= node.IMAGE_SIZE:
        raise _error(
            node, "DIGIT_SIZE", f"8 <= least <= greatest <= IMAGE_SIZE = {node.IMAGE_SIZE} (pixels)"
        )
    if 2 * small > node.IMAGE_SIZE:
        raise _error(node, "DIGIT_SIZE", "a least height of at most half of IMAGE_SIZE (pixels)")
    if not (_whole(node.SEED) and node.SEED >= 0):
        raise _error(node, "SEED", "an integer >= 0")
    if not (math.isfinite(node.DIFFICULTY) and 0 <= node.DIFFICULTY <= 2):
        raise _error(node, "DIFFICULTY", "a number from 0 to 2")
    counts = node.NUM_IMAGES
    if len(counts) != len(SPLITS) or not all(_whole(n) and n >= 1 for n in counts):
        raise _error(node, "NUM_IMAGES", "three integers >= 1: (train, val, test)")
    if not str(node.ROOT):
        raise _error(node, "ROOT", "a folder")
    scene = Scene(
        seed=int(node.SEED),
        image_size=int(node.IMAGE_SIZE),
        digits_per_image=(int(low), int(high)),
        digit_size=(float(small), float(large)),
        difficulty=float(node.DIFFICULTY),
    )
    root = Path(os.path.expanduser(node.ROOT))
    return [
        DigitsSplit(scene, split, int(n), root) for split, n in zip(SPLITS, counts, strict=True)
    ]


def _pair(node: CfgNode, key: str) -> tuple[float, float]:
    value = node[key]
    if len(value) != 2:
        raise _error(node, key, "two numbers: (least, greatest)")
    return value[0], value[1]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _error(node: CfgNode, key: str, expected: str) -> ValueError:
    return ValueError(f"DATASETS.DIGITS.{key} is {node[key]!r}: expected {expected}.")
