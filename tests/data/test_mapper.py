"""Image files of every kind are read correctly, or named."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from PIL import Image

from ssim_kd.data import CheckedMapper, UnreadableImageError
from ssim_kd.data.mapper import check_image_files, reads_images, seeded

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
def test_checked_mapper_kinds_of_files(mapper, tmp_path, image, name, expected):
    image.save(tmp_path / name)
    np.testing.assert_array_equal(pixels(mapper(record(tmp_path / name))), expected)


def test_checked_mapper_cmyk(mapper, tmp_path):
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")  # red
    red, green, blue = pixels(mapper(record(tmp_path / "ink.jpg"))).reshape(-1, 3).mean(axis=0)
    assert red > 200 and green < 60 and blue < 60


def test_checked_mapper_exif_rotation(mapper, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    Image.fromarray(COLOUR).save(tmp_path / "turned.png", exif=exif)
    turned = np.rot90(COLOUR, k=-1)
    mapped = mapper(record(tmp_path / "turned.png", width=6, height=8))
    np.testing.assert_array_equal(pixels(mapped), turned)
    # Annotations made without regard to the rotation are refused, not trained on.
    with pytest.raises(UnreadableImageError, match=r"turned\.png.*EXIF"):
        mapper(record(tmp_path / "turned.png"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_checked_mapper_more_than_8_bits(mapper, tmp_path, dtype):
    Image.fromarray(GREY.astype(dtype) * dtype(100)).save(tmp_path / "deep.tif")
    with pytest.raises(UnreadableImageError, match=r"'my_set': image .*deep\.tif: .*8 bits"):
        mapper(record(tmp_path / "deep.tif"))


def test_checked_mapper_one_pixel(cfg, tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    cfg.INPUT.FORMAT = "RGB"
    mapped = CheckedMapper(DatasetMapper(cfg, False))(record(tmp_path / "dot.png", 1, 1))
    assert mapped["image"].shape == (3, 800, 800)
    assert mapped["image"].flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]


def test_checked_mapper_line_of_pixels(cfg, tmp_path):
    Image.new("RGB", (5000, 1)).save(tmp_path / "line.png")
    with pytest.raises(RuntimeError, match=r"line\.png: the mapper failed"):
        CheckedMapper(DatasetMapper(cfg, False))(record(tmp_path / "line.png", 5000, 1))


def test_checked_mapper_fault_of_the_code(tmp_path):
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


def fails(error):
    def mapper(record):
        raise error

    return mapper


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError("cut short"), UnreadableImageError),
        (ValueError("cannot reshape array"), RuntimeError),
        (KeyError("annotations"), RuntimeError),
    ],
)
def test_checked_mapper_around_ones_own(error, raised):
    """The file is not an image, and in a zip: Pillow is not asked."""
    checked = CheckedMapper(fails(error), ["my_set"])
    with pytest.raises(raised, match=r"'my_set': image all\.zip/5\.npy: ") as caught:
        checked({"file_name": "all.zip/5.npy"})
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("item", [7, ("a", "b"), {"file_name": 3}, {"key": b"x"}])
def test_checked_mapper_any_record(item):
    assert CheckedMapper(lambda x: (x, 1))(item) == (item, 1)


class Subclass(DatasetMapper):
    def __call__(self, record):
        return record


def test_reads_images(cfg):
    assert reads_images(None) and reads_images(DatasetMapper(cfg, False))
    assert not reads_images(Subclass(cfg, False)) and not reads_images(dict)


def test_checked_mapper_path_object(mapper, tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(
        pixels(mapper(record("") | {"file_name": tmp_path / "colour.png"})), COLOUR
    )


def test_check_image_files(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "0.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.png").write_bytes(b"")
    good = [record(tmp_path / "0.png"), record(tmp_path / "sub" / "1.png"), {"other": 1}]
    check_image_files("here", [*good, record("s3://bucket/5.png")])
    with pytest.raises(FileNotFoundError, match=r"here: 2 of 4 image files .*sub/9\.png"):
        missing = [record(tmp_path / "sub" / "9.png"), record(tmp_path / "none" / "0.png")]
        check_image_files("here", [*good, *missing])
    with pytest.raises(UnreadableImageError, match=r"here: the first image, \S*1\.png"):
        check_image_files("here", good[1:])
    labelled = [record(tmp_path / "0.png") | {"sem_seg_file_name": str(tmp_path / "none.png")}]
    with pytest.raises(FileNotFoundError, match=r"1 of 2 image files .*none\.png"):
        check_image_files("here", labelled)
