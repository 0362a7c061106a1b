"""Distillation losses over feature maps: functions of tensors, with thin modules around them."""

from ssim_kd.ops.options import SSIMOptions, check_ssim_options
from ssim_kd.ops.scaling import minmax_scale
from ssim_kd.ops.ssim_reference import SSIMComponents

from .lp import LpLoss, lp_loss
from .masking import masked_mean
from .ssim import SSIMLoss, pyramid_ssim_loss, ssim_loss
from .ssim_map import ssim_map

__all__ = [
    "LpLoss",
    "SSIMComponents",
    "SSIMLoss",
    "SSIMOptions",
    "check_ssim_options",
    "lp_loss",
    "masked_mean",
    "minmax_scale",
    "pyramid_ssim_loss",
    "ssim_loss",
    "ssim_map",
]
