"""FGD's weights for FCOS."""

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from ssim_kd.projects.fgd import FGDDistiller

_base = LazyConfig.load_rel("../../../configs/COCO-Detection/Base-FCOS.py")
model, optimizer, dataloader, train = _base.model, _base.optimizer, _base.dataloader, _base.train
lr_multiplier = _base.lr_multiplier

model.distillers = [
    L(FGDDistiller)(
        temperature=0.8,
        part_weights={"fg": 1.6e-3, "bg": 8e-4, "attention": 8e-4, "global": 8e-6},
    )
]
