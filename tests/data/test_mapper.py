"""Image files of every kind are read correctly, or named."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from PIL import Image

from ssim_kd.data import CheckedMapper, UnreadableImageError
from ssim_kd.data.mapper import seeded

GREY = (np.arange(6 * 8, dtype=np.uint8) * 5).reshape(6, 8)
COLOUR = np.dstack([GREY, 255 - GREY, GREY // 2])


@pytest.fixture
def mapper(cfg):
    """Detectron2's own mapper without augmentation, in RGB."""
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 0, 0, "RGB"
    return CheckedMapper(DatasetMapper(cfg, False), ["my_set"])


def record(path, width=8, height=6):
    return {"file_name": str(path), "image_id": 1, "width": width, "height": height}


def pixels(mapped):
    return mapped["image"].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.fromarray(GREY), "grey.png", np.dstack([GREY] * 3)),
        (Image.fromarray(np.dstack([GREY, GREY])), "grey_alpha.png", np.dstack([GREY] * 3)),
        (Image.fromarray(np.dstack([COLOUR, GREY])), "rgba.png", COLOUR),
        (Image.fromarray(GREY > 100), "bits.png", np.dstack([(GREY > 100) * 255] * 3)),
        (Image.fromarray(GREY).convert("P"), "palette.png", np.dstack([GREY] * 3)),
        (Image.fromarray(COLOUR), "colour.bmp", COLOUR),
        (Image.fromarray(COLOUR), "colour.tif", COLOUR),
    ],
)
def test_kinds_of_files(mapper, tmp_path, image, name, expected):
    image.save(tmp_path / name)
    np.testing.assert_array_equal(pixels(mapper(record(tmp_path / name))), expected)


def test_cmyk_jpeg(mapper, tmp_path):
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")  # red
    red, green, blue = pixels(mapper(record(tmp_path / "ink.jpg"))).reshape(-1, 3).mean(axis=0)
    assert red > 200 and green < 60 and blue < 60


def test_exif_rotation(mapper, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    Image.fromarray(COLOUR).save(tmp_path / "turned.png", exif=exif)
    turned = np.rot90(COLOUR, k=-1)
    mapped = mapper(record(tmp_path / "turned.png", width=6, height=8))
    np.testing.assert_array_equal(pixels(mapped), turned)
    # Annotations made without regard to the rotation: told, not trained on.
    with pytest.raises(UnreadableImageError, match=r"turned\.png.*EXIF"):
        mapper(record(tmp_path / "turned.png"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_is_named(mapper, tmp_path, dtype):
    Image.fromarray(GREY.astype(dtype) * dtype(100)).save(tmp_path / "deep.tif")
    with pytest.raises(UnreadableImageError, match=r"'my_set': image .*deep\.tif: .*8 bits"):
        mapper(record(tmp_path / "deep.tif"))


def test_one_pixel(cfg, tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    cfg.INPUT.FORMAT = "RGB"
    mapped = CheckedMapper(DatasetMapper(cfg, False))(record(tmp_path / "dot.png", 1, 1))
    assert mapped["image"].shape == (3, 800, 800)
    assert mapped["image"].flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]


def test_line_of_pixels_is_named_or_read(cfg, tmp_path):
    Image.new("RGB", (5000, 1)).save(tmp_path / "line.png")
    with pytest.raises(RuntimeError, match=r"line\.png: the mapper failed"):
        CheckedMapper(DatasetMapper(cfg, False))(record(tmp_path / "line.png", 5000, 1))


def test_fault_of_the_code_is_not_blamed_on_the_image(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "good.png")

    def broken(record):
        raise KeyError("annotations")

    with pytest.raises(RuntimeError, match=r"good\.png: the mapper failed: KeyError") as caught:
        CheckedMapper(broken)(record(tmp_path / "good.png"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_seeded_restores_all_generators():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    numbers = []
    for _ in range(2):
        with seeded(11):
            numbers.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert numbers[0] == numbers[1]
    with pytest.raises(ValueError, match="inside"), seeded(3):
        raise ValueError("inside")
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
