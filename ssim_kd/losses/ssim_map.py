"""SSIM cell by cell, for pictures of what is distilled.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ssim_kd.ops.cells import check_maps, check_mask, compute_dtype
from ssim_kd.ops.options import check_ssim_options
from ssim_kd.ops.scaling import minmax_scale
from ssim_kd.ops.ssim_reference import (
    SSIMComponents,
    ssim_components_reference,
    ssim_map_reference,
)


@overload
def ssim_map(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    components: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def ssim_map(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    components: Literal[True],
    **options: Any,
) -> SSIMComponents: ...
def ssim_map(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    components: bool = False,
    **options: Any,
) -> Tensor | SSIMComponents:
    """SSIM of the window around every cell; the loss is (1 - its mean) / 2.

    Args:
        input: the student's map, (N, C, H, W), floating point.
        target: the teacher's map, the same shape; treated as a constant.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; used by the scaling.
        components: give luminance, contrast and structure, without their exponents, instead.
        options: those of ``ssim_loss``. ``impl`` is not used: this is always the reference.

    Returns:
        (N, C, H, W) float32 (float64 for float64 input) in about [-1, 1], 1 where the maps agree;
        or ``SSIMComponents`` of three such maps. For padding "valid" r cells are cut from each
        side, r the window's radius, where the map is at least as large as the window.

    Raises:
        ValueError: as ``ssim_loss``.
    """
    opts = check_ssim_options(**{**options, "impl": "reference"})
    check_maps(input, target)
    mask = check_mask(mask, input)
    x, y = input.to(compute_dtype(input)), target.detach().to(compute_dtype(input))
    if x.numel() == 0:
        empty = x * 1.0
        return SSIMComponents(empty, empty, empty) if components else empty
    if opts.scaling is not None:
        x = minmax_scale(x, scope=opts.scaling, mask=mask, grad_through_extrema=opts.scaling_grad)
        y = minmax_scale(y, scope=opts.scaling, mask=mask)
    crop = opts.crop(*x.shape[2:])
    inside = (..., slice(crop, x.shape[2] - crop), slice(crop, x.shape[3] - crop))
    if components:
        return SSIMComponents(*(part[inside] for part in ssim_components_reference(x, y, opts)))
    return ssim_map_reference(x, y, opts)[inside]
