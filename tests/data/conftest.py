"""What the tests of the data share."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ssim_kd.config import add_distill_config
from ssim_kd.data import coco as coco_module
from ssim_kd.data import register_coco
from ssim_kd.data.digits import dataset as digits_module
from tests.data.coco_sets import write


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


@pytest.fixture
def use(cfg, tmp_path):
    """Write a data set, register it and make it the training and test set."""

    def _use(data, **options):
        paths = write(tmp_path / "set", data, **options)
        cfg.DATASETS.REGISTER_COCO = [["my_set", *paths]]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("my_set",)
        register_coco(cfg)
        return cfg

    return _use
