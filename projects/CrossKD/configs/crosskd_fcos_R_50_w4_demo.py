"""The demo's FCOS, taught by the FCOS teacher."""

import os

from detectron2.config import LazyCall as L

from ssim_kd import DistilledDetector, FrozenTeacher
from ssim_kd.projects.crosskd import CrossKDDistiller

from .plain_fcos_R_50_w4_demo import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from .plain_fcos_R_50_w4_demo import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher.load_from)(
        name=os.path.join(os.path.dirname(__file__), "teacher_fcos_R_50_w8_demo.py"),
        weights="output/demo/teacher_fcos/model_final.pth",
    ),
    distillers=[L(CrossKDDistiller)()],
    max_iter="${..train.max_iter}",
)
