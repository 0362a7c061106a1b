"""Parameters of the digits: read, refused, and a folder for each combination."""

import pytest

from ssim_kd.data.digits.scene import splits_from_config


def test_splits_from_config_folder_by_parameter(cfg):
    folders = {splits_from_config(cfg)[0].folder}
    for key, value in (
        ("SEED", 1),
        ("IMAGE_SIZE", 72),
        ("DIGITS_PER_IMAGE", (1, 8)),
        ("DIGIT_SIZE", (15, 30)),
        ("DIFFICULTY", 0.5),
        ("NUM_IMAGES", (7, 3, 2)),
    ):
        cfg.DATASETS.DIGITS[key] = value
        folders.add(splits_from_config(cfg)[0].folder)
    assert len(folders) == 7


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", -1),
        ("IMAGE_SIZE", 8),
        ("NUM_IMAGES", (1, 1)),
        ("NUM_IMAGES", (0, 1, 1)),
        ("DIGITS_PER_IMAGE", (0, 3)),
        ("DIGITS_PER_IMAGE", (4, 3)),
        ("DIGITS_PER_IMAGE", (4,)),
        ("DIGIT_SIZE", (4, 30)),
        ("DIGIT_SIZE", (14, 65)),
        ("DIGIT_SIZE", (40, 60)),
        ("DIFFICULTY", -0.1),
        ("DIFFICULTY", float("nan")),
        ("ROOT", ""),
    ],
)
def test_splits_from_config_bad_value(cfg, key, value):
    cfg.DATASETS.DIGITS[key] = value
    with pytest.raises(ValueError, match=rf"DATASETS\.DIGITS\.{key} is .*expected"):
        splits_from_config(cfg)
