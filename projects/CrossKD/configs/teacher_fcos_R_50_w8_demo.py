"""The FCOS teacher on digits: twice as wide, trained longer."""

import os

from .plain_fcos_R_50_w4_demo import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.config_file = os.path.join(
    os.path.dirname(model.config_file), "teacher_retinanet_R_50_w8_demo.yaml"
)
lr_multiplier.warmup_length = 50 / 1200
train.max_iter = train.eval_period = 1200
train.output_dir = "output/demo/teacher_fcos"
