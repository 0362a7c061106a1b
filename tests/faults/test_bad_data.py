"""Images and annotations that are wrong, through the whole training (units: tests/data)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(tmp_path / "data")


def corrupt(data: DataSet) -> None:
    path = data.images / "5.png"
    path.write_bytes(path.read_bytes()[:2000])


def missing(data: DataSet) -> None:
    (data.images / "5.png").unlink()


def empty(data: DataSet) -> None:
    (data.images / "5.png").write_bytes(b"")


def deep(data: DataSet) -> None:
    Image.fromarray(np.full((96, 96), 40000, np.uint16)).save(data.images / "5.png")


@pytest.mark.parametrize("spoil", [corrupt, missing, empty, deep])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(spoil, workers, data, world: World, tmp_path) -> None:
    spoil(data)
    options = [*data.options(), "DATALOADER.NUM_WORKERS", workers]
    with pytest.raises(Exception, match=r"5\.png") as raised:
        world.main(tmp_path / "stops", *options)
    assert f"set_{tmp_path.name}" in str(raised.value)
    assert not list((tmp_path / "stops").glob("*.pth"))

    world.main(tmp_path / "goes on", *options, "DATALOADER.SKIP_CORRUPT", "True")
    assert re.search(r"1 images could not be read \(.*\n.*5\.png", log(tmp_path / "goes on"))
    assert checkpoint(tmp_path / "goes on")["iteration"] == 3


def grey(data: DataSet) -> None:
    Image.fromarray(np.full((96, 96), 100, np.uint8)).save(data.images / "5.png")


def rgba(data: DataSet) -> None:
    Image.fromarray(np.full((96, 96, 4), 100, np.uint8)).save(data.images / "5.png")


def rotated(data: DataSet) -> None:
    """48 x 96 on the disk, to be shown turned: 96 x 48, which is what COCO's file says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((48, 96, 3), 100, np.uint8)).save(data.images / "5.jpg", exif=exif)
    data.content["images"][5] |= {"file_name": "5.jpg", "height": 96, "width": 48}
    data.content["annotations"][5]["bbox"] = [4, 10, 30, 40]


def one_pixel(data: DataSet) -> None:
    Image.fromarray(np.full((1, 1, 3), 100, np.uint8)).save(data.images / "5.png")
    data.content["images"][5] |= {"height": 1, "width": 1}
    data.content["annotations"][5]["bbox"] = [0, 0, 1, 1]


def no_boxes(data: DataSet) -> None:
    del data.content["annotations"][5]


def outside_in_part(data: DataSet) -> None:
    data.content["annotations"][5]["bbox"] = [80, 80, 100, 100]


@pytest.mark.parametrize("spoil", [grey, rgba, rotated, one_pixel, no_boxes, outside_in_part])
@pytest.mark.parametrize("keep_empty", [False, True])
def test_what_is_handled(spoil, keep_empty, data, world: World, tmp_path) -> None:
    spoil(data)
    options = [*data.options(), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", not keep_empty]
    world.main(tmp_path / "out", *options)
    assert checkpoint(tmp_path / "out")["iteration"] == 3


def zero_area(data: DataSet) -> None:
    data.content["annotations"][5]["bbox"] = [10, 10, 0, 40]


def outside(data: DataSet) -> None:
    data.content["annotations"][5]["bbox"] = [200, 200, 10, 10]


@pytest.mark.parametrize("spoil", [zero_area, outside])
def test_boxes_without_area(spoil, data, world: World, tmp_path) -> None:
    spoil(data)
    options = data.options()
    with pytest.raises(ValueError, match="1 boxes have zero area or lie outside"):
        world.main(tmp_path / "stops", *options, "DATASETS.ZERO_AREA_BOXES", "error")
    world.main(tmp_path / "goes on", *options, "DATASETS.ZERO_AREA_BOXES", "drop")
    assert "1 boxes of zero area left out" in log(tmp_path / "goes on")


def double_image(data: DataSet) -> None:
    data.content["images"][1]["id"] = 1


def double_annotation(data: DataSet) -> None:
    data.content["annotations"][1]["id"] = 1


def not_a_number(data: DataSet) -> None:
    data.content["annotations"][5]["bbox"] = [float("nan"), 10, 10, 10]


def unknown_image(data: DataSet) -> None:
    data.content["annotations"][5]["image_id"] = 99


@pytest.mark.parametrize("spoil", [double_image, double_annotation, not_a_number, unknown_image])
def test_a_file_that_is_refused(spoil, data, world: World, tmp_path) -> None:
    spoil(data)
    with pytest.raises(ValueError, match=r"annotations\.json: .*Correct the file"):
        world.main(tmp_path / "out", *data.options())
