"""Images and annotations that are wrong, through the whole training (units: tests/data)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from tests.engine.runs import World, checkpoint, log

pytestmark = pytest.mark.faults


class DataSet:
    """Eight images of noise with a box each, that can be spoiled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.json = folder, folder / "annotations.json"
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        noise = np.random.default_rng(0)
        self.content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i + 1, "name": f"class{i}"} for i in range(10)],
        }
        for i in range(8):
            name = f"{i}.png"
            Image.fromarray(noise.integers(0, 256, (96, 96, 3), np.uint8)).save(self.images / name)
            self.content["images"].append(
                {"id": i + 1, "file_name": name, "height": 96, "width": 96}
            )
            self.content["annotations"].append(
                {
                    "id": i + 1,
                    "image_id": i + 1,
                    "category_id": i % 10 + 1,
                    "bbox": [10, 10, 40, 40],
                    "area": 1600,
                    "iscrowd": 0,
                }
            )

    def options(self) -> list[Any]:
        self.json.write_text(json.dumps(self.content))
        name = f"set_{self.folder.parent.name}"
        return [
            *("DATASETS.REGISTER_COCO", repr([[name, str(self.json), str(self.images)]])),
            *("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"),
            *("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 100),
        ]

    def picture(self, value: int, *shape: int, dtype: Any = np.uint8) -> None:
        """Replace the sixth image."""
        Image.fromarray(np.full(shape, value, dtype)).save(self.images / "5.png")


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(tmp_path / "data")


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "of 16 bits": lambda path: Image.fromarray(np.full((96, 96), 40000, np.uint16)).save(path),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("workers", [0, 2])
def test_main_image_unreadable(kind, workers, data, world: World, tmp_path) -> None:
    UNREADABLE[kind](data.images / "5.png")
    options = [*data.options(), "DATALOADER.NUM_WORKERS", workers]
    with pytest.raises(Exception, match=r"5\.png") as raised:
        world.main(tmp_path / "stops", *options)
    assert f"set_{tmp_path.name}" in str(raised.value)
    assert not list((tmp_path / "stops").glob("*.pth"))

    world.main(tmp_path / "goes on", *options, "DATALOADER.SKIP_CORRUPT", "True")
    assert re.search(r"1 images could not be read \(.*\n.*5\.png", log(tmp_path / "goes on"))
    assert checkpoint(tmp_path / "goes on")["iteration"] == 3


def rotated(data: DataSet) -> None:
    """48 x 96 on the disk, to be shown turned: 96 x 48, which is what COCO's file says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((48, 96, 3), 100, np.uint8)).save(data.images / "5.jpg", exif=exif)
    data.content["images"][5] |= {"file_name": "5.jpg", "height": 96, "width": 48}
    data.content["annotations"][5]["bbox"] = [4, 10, 30, 40]


def one_pixel(data: DataSet) -> None:
    data.picture(100, 1, 1, 3)
    data.content["images"][5] |= {"height": 1, "width": 1}
    data.content["annotations"][5]["bbox"] = [0, 0, 1, 1]


def box(*numbers: Any) -> Callable[[DataSet], Any]:
    return lambda data: data.content["annotations"][5].update(bbox=[*numbers])


HANDLED: dict[str, Callable[[DataSet], Any]] = {
    "grey": lambda data: data.picture(100, 96, 96),
    "RGBA": lambda data: data.picture(100, 96, 96, 4),
    "rotated": rotated,
    "one pixel": one_pixel,
    "no boxes": lambda data: data.content["annotations"].pop(5),
    "outside in part": box(80, 80, 100, 100),
}


@pytest.mark.parametrize("kind", HANDLED)
@pytest.mark.parametrize("keep_empty", [False, True])
def test_main_image_or_box_handled(kind, keep_empty, data, world: World, tmp_path) -> None:
    HANDLED[kind](data)
    options = [*data.options(), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", not keep_empty]
    world.main(tmp_path / "out", *options)
    assert checkpoint(tmp_path / "out")["iteration"] == 3


@pytest.mark.parametrize("spoil", [box(10, 10, 0, 40), box(200, 200, 10, 10)])
def test_main_boxes_without_area(spoil, data, world: World, tmp_path) -> None:
    spoil(data)
    options = data.options()
    with pytest.raises(ValueError, match="1 boxes have zero area or lie outside"):
        world.main(tmp_path / "stops", *options, "DATASETS.ZERO_AREA_BOXES", "error")
    world.main(tmp_path / "goes on", *options, "DATASETS.ZERO_AREA_BOXES", "drop")
    assert "1 boxes of zero area left out" in log(tmp_path / "goes on")


def crowds(data: DataSet) -> None:
    for annotation in data.content["annotations"]:
        annotation["iscrowd"] = 1


def flat_polygon(data: DataSet) -> None:
    data.content["annotations"][5]["segmentation"] = [10, 10, 50, 10, 50, 50]


REFUSED: dict[str, Callable[[DataSet], Any]] = {
    "double image": lambda data: data.content["images"][1].update(id=1),
    "double annotation": lambda data: data.content["annotations"][1].update(id=1),
    "NaN": box(float("nan"), 10, 10, 10),
    "text": box("10", "10", "40", "40"),
    "flat polygon": flat_polygon,
    "crowds": crowds,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_main_file_refused(kind, data, world: World, tmp_path) -> None:
    REFUSED[kind](data)
    with pytest.raises(ValueError, match=rf"DATASETS\.TRAIN: data set 'set_{tmp_path.name}'"):
        world.main(tmp_path / "out", *data.options())
    assert not list((tmp_path / "out").glob("*.pth"))


def unknown_image(data: DataSet) -> None:
    data.content["annotations"].append({**data.content["annotations"][5], "id": 9, "image_id": 99})


def id_of_zero(data: DataSet) -> None:
    data.content["annotations"][0]["id"] = 0


@pytest.mark.parametrize("spoil", [unknown_image, id_of_zero])
def test_main_file_noted(spoil, data, world: World, tmp_path) -> None:
    spoil(data)
    world.main(tmp_path / "out", *data.options())
    assert re.search(r"DATASETS\.TRAIN: set_\S+: 8 images.*; 1 annotations ", log(tmp_path / "out"))


MASKS = [
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
]


def test_main_run_lengths_under_polygon(data, world: World, tmp_path) -> None:
    for annotation in data.content["annotations"]:
        annotation["segmentation"] = [[10, 10, 50, 10, 50, 50]]
    # Columns 10 to 49, rows 10 to 49, in COCO's order.
    counts = [10 * 96 + 10, *[40, 56] * 39, 40]
    counts.append(96 * 96 - sum(counts))
    data.content["annotations"][5]["segmentation"] = {"size": [96, 96], "counts": counts}
    options = [*data.options(), *MASKS]
    with pytest.raises(ValueError, match=r"id 6 of image 6.*INPUT\.MASK_FORMAT is 'polygon'"):
        world.main(tmp_path / "stops", *options)
    world.main(tmp_path / "goes on", *options, "INPUT.MASK_FORMAT", "bitmask")
    assert checkpoint(tmp_path / "goes on")["iteration"] == 3


def register_by_code(data: DataSet, classes: int, name: str) -> list[Any]:
    """Register the set as a custom script does, and return the options to train with it."""

    def records() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = load_coco_json(str(data.json), str(data.images))
        for record in found:
            for annotation in record["annotations"]:
                annotation["category_id"] = (annotation["category_id"] - 1) % classes
        return found

    options = data.options()
    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(thing_classes=[f"class{i}" for i in range(classes)])
    return [*options, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]


def test_main_twice_on_a_set_of_code(data, world: World, tmp_path) -> None:
    """A notebook: the second run, after the first one's folder was removed."""
    options = register_by_code(data, 10, f"twice_{tmp_path.name}")
    options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    results = []
    for _ in range(2):
        world.main(tmp_path / "out", *options)
        lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
        results += [row["bbox/AP"] for row in map(json.loads, lines) if "bbox/AP" in row]
        shutil.rmtree(tmp_path / "out")
    assert len(results) == 2 and results[0] == results[1] >= 0


@pytest.mark.parametrize("config", ["config", "retinanet"])
def test_main_classes_of_a_set_of_code(config, data, world: World, tmp_path) -> None:
    options = register_by_code(data, 9, f"nine_{config}_{tmp_path.name}")
    with pytest.raises(ValueError, match=r"9 .*NUM_CLASSES is 10"):
        world.main(tmp_path / "out", *options, config=getattr(world, config))
