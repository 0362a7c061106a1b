"""CrossKD's setting for FCOS: two convolutions of the student, weights 0.4 and 0.75."""

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from ssim_kd.projects.crosskd import CrossKDDistiller

_base = LazyConfig.load_rel("../../../configs/COCO-Detection/Base-FCOS.py")
model, optimizer, dataloader, train = _base.model, _base.optimizer, _base.dataloader, _base.train
lr_multiplier = _base.lr_multiplier

model.distillers = [L(CrossKDDistiller)()]
