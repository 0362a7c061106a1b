"""ICD's published setting for FCOS: FPN and heads begin as the teacher's."""

from .icd_fcos_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.init_from_teacher = ["fpn", "heads"]
