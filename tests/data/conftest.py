"""What the tests of the data share."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ssim_kd.config import add_distill_config
from ssim_kd.data import coco as coco_module
from ssim_kd.data.digits import dataset as digits_module


@pytest.fixture
def cfg(tmp_path):
    """A config for two classes; what a test registers is gone after it."""
    before = set(DatasetCatalog)
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.DATASETS.DIGITS.ROOT = str(tmp_path / "digits")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    yield cfg
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)
        coco_module._REGISTERED.pop(name, None)
        digits_module._REGISTERED.pop(name, None)
