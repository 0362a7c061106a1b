"""FCOS on the digits of the demo: its student's backbone, towers of two convolutions."""

import os

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ssim_kd.projects.crosskd.fcos import build_fcos, read_config

_DIGITS = os.path.join(os.path.dirname(__file__), "../../../configs/Digits-Detection")
_CONFIG = os.path.join(_DIGITS, "plain_retinanet_R_50_w4_demo.yaml")
_cfg = read_config(_CONFIG)

_zoo = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
optimizer, dataloader, train = _zoo.optimizer, _zoo.dataloader, _zoo.train

model = L(build_fcos)(config_file=_CONFIG, num_convs=2)

dataloader.train.dataset.names = "digits_train"
dataloader.test.dataset.names = "digits_test"
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = dataloader.test.num_workers = 1
# One size, and no flip: a mirrored digit is another sign.
del dataloader.train.mapper.augmentations[1]
for _part in (dataloader.train, dataloader.test):
    _part.mapper.augmentations[0].short_edge_length = (128,) if _part is dataloader.train else 128
    _part.mapper.augmentations[0].max_size = 128

optimizer.lr = 0.05
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=50 / 750,
    warmup_method="linear",
    warmup_factor=0.001,
)
train.init_checkpoint = ""
train.max_iter = train.eval_period = 750
train.checkpointer.period = 200
