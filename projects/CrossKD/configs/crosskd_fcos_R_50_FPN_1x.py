"""CrossKD's setting for FCOS: two convolutions of the student, weights 0.4 and 0.75."""

import os

from detectron2.config import LazyCall as L

from ssim_kd import DistilledDetector, FrozenTeacher
from ssim_kd.projects.crosskd import CrossKDDistiller

from .plain_fcos_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from .plain_fcos_R_50_FPN_1x import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher.load_from)(
        name=os.path.join(os.path.dirname(__file__), "teacher_fcos_R_101_FPN_2x.py"),
        weights="output/fcos_R_101/model_final.pth",
    ),
    distillers=[L(CrossKDDistiller)(depth=2, cls_weight=0.4, box_weight=0.75)],
    max_iter="${..train.max_iter}",
)
