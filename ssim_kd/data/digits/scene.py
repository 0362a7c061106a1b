"""Parameters of the digits data set: ``splits_from_config(cfg)`` reads ``DATASETS.DIGITS``."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode

SPLITS = ("train", "val", "test")
CLASSES = tuple("0123456789")
# Raised whenever the renderer draws other pictures than before.
VERSION = 1


@dataclass(frozen=True)
class Scene:
    """What is drawn, the same for all images of a set. See the keys of ``DATASETS.DIGITS``."""

    seed: int
    image_size: int
    digits_per_image: tuple[int, int]
    digit_size: tuple[float, float]
    difficulty: float


@dataclass(frozen=True)
class DigitsSplit:
    """One split on disk: what it shows, how many images, and its folder."""

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
