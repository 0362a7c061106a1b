"""Writes a rendered split to disk, whole or not at all, by one process at a time."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import portalocker
from PIL import Image
from tqdm import tqdm

from .render import Scene, render_image

logger = logging.getLogger(__name__)


def make_split(
    scene: Scene, split: str, num_images: int, folder: Path, classes: Sequence[str]
) -> None:
    """Draw a split into ``folder``, unless it is there: ``000000.png`` ... ``annotations.json``.

    The folder appears at once when it is complete, so it never holds half a split. Other processes
    that want the same split wait on a lock which the operating system frees when its holder dies.

    Args:
        scene: what to draw, see :func:`render_image`.
        split: "train", "val" or "test".
        num_images: >= 1.
        folder: made with its parents.
        classes: names of the categories; their ids in the json file are 1, 2, ...

    Raises:
        OSError: the folder cannot be written (no permission, disk full). What was drawn so far is
            removed by the next attempt.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock_file = folder.parent / f".{folder.name}.lock"
    with _locked(lock_file):
        if folder.exists():  # made while we waited
            return
        # We hold the lock: whatever lies here is of a process that was killed.
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _draw_into(unfinished, scene, split, num_images, classes)
        os.replace(unfinished, folder)
        _sync(folder.parent)
    logger.info("Made %d images of %s in %s", num_images, split, folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it as long as it takes."""
    flags = portalocker.LockFlags
    with open(path, "a") as file:
        try:
            portalocker.lock(file, flags.EXCLUSIVE | flags.NON_BLOCKING)
        except portalocker.LockException:
            logger.info("Waiting for another process that draws %s", path.parent)
            portalocker.lock(file, flags.EXCLUSIVE)
        yield  # closing the file frees the lock


def _draw_into(
    folder: Path, scene: Scene, split: str, num_images: int, classes: Sequence[str]
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(num_images), desc=f"Drawing digits_{split}", unit="img"):
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
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
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
