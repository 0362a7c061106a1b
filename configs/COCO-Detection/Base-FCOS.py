"""FCOS on COCO, student and 1x schedule of Detectron2's zoo; a config adds its distillers."""

import os

from detectron2.config import LazyCall as L

from ssim_kd import DistilledDetector, FrozenTeacher

from .plain_fcos_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from .plain_fcos_R_50_FPN_1x import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher.load_from)(
        name=os.path.join(os.path.dirname(__file__), "teacher_fcos_R_101_FPN_2x.py"),
        # The zoo has no weights of an FCOS.
        weights="output/fcos_R_101/model_final.pth",
    ),
    distillers=[],
    max_iter="${..train.max_iter}",
)
