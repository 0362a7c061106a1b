"""What the tests of the digits share."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ssim_kd.config import add_distill_config
from ssim_kd.data.digits.scene import SPLITS


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_distill_config(cfg)
    digits = cfg.DATASETS.DIGITS
    digits.ROOT, digits.IMAGE_SIZE, digits.DIGIT_SIZE = str(tmp_path), 64, (14, 30)
    digits.NUM_IMAGES = (6, 3, 2)
    yield cfg
    for split in SPLITS:
        DatasetCatalog.pop(f"digits_{split}", None)
        MetadataCatalog.pop(f"digits_{split}", None)
