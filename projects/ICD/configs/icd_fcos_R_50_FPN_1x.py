"""ICD's levels and weight for FCOS; FPN and heads begin as the teacher's."""

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from ssim_kd.projects.icd import ICDDistiller

_base = LazyConfig.load_rel("../../../configs/COCO-Detection/Base-FCOS.py")
model, optimizer, dataloader, train = _base.model, _base.optimizer, _base.dataloader, _base.train
lr_multiplier = _base.lr_multiplier

model.distillers = [
    L(ICDDistiller)(levels=["p3", "p4", "p5", "p6", "p7"], part_weights={"value": 8.0})
]
model.init_from_teacher = ["fpn", "heads"]
