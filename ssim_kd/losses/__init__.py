"""Distillation losses over feature maps: functions of tensors, with thin modules around them."""

from ssim_kd.ops.options import SSIMOptions
from ssim_kd.ops.reference import SSIMComponents
from ssim_kd.ops.select import check_ssim_options

from .attention import (
    cell_means,
    channel_attention,
    masked_log_softmax,
    masked_softmax,
    spatial_attention,
)
from .boxes import (
    background_weights,
    box_cells,
    covered_cells,
    foreground_weights,
    has_area,
    roi_crops,
)
from .lp import LpLoss, lp_loss
from .masking import channel_moments, masked_mean, masked_sum, valid_cells
from .reference import ReferenceSize, norm_scales, reference_size, size_scales
from .scaling import minmax_scale
from .ssim import SSIMLoss, pyramid_ssim_loss, ssim_loss, ssim_map

__all__ = [
    "LpLoss",
    "ReferenceSize",
    "SSIMComponents",
    "SSIMLoss",
    "SSIMOptions",
    "background_weights",
    "box_cells",
    "cell_means",
    "channel_attention",
    "channel_moments",
    "check_ssim_options",
    "covered_cells",
    "foreground_weights",
    "has_area",
    "lp_loss",
    "masked_log_softmax",
    "masked_mean",
    "masked_softmax",
    "masked_sum",
    "minmax_scale",
    "norm_scales",
    "pyramid_ssim_loss",
    "reference_size",
    "roi_crops",
    "size_scales",
    "spatial_attention",
    "ssim_loss",
    "ssim_map",
    "valid_cells",
]
