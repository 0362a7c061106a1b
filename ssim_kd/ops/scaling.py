"""Min-max scaling of feature maps to [0, 1], the paper's psi, as plain differentiable torch.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import check_mask, compute_dtype
from .options import SCOPES, check_choice

# A range below this counts as constant. Activations are of the order of 1, so a range of 1e-4 is
# rounding noise or a dead channel; scaling it up would multiply gradients by more than 1e4.
MIN_RANGE = 1e-4
SCOPE_DIMS = {"channel": (2, 3), "sample": (1, 2, 3), "batch": (0, 1, 2, 3)}


def relative_floor(dtype: torch.dtype) -> float:
    """The smallest range, relative to the largest magnitude, that is more than rounding noise."""
    return 4 * torch.finfo(dtype).eps


def half_low_and_scale(
    low: Tensor, high: Tensor, peak: Tensor, min_range: float = MIN_RANGE
) -> tuple[Tensor, Tensor]:
    """``low / 2`` and ``2 / (high - low)``, so that (x / 2 - low / 2) * scale lies in [0, 1].

    Everything is halved because high - low can overflow where both are finite.

    Args:
        low, high: extrema, any shape; inf and -inf where there was no valid cell.
        peak: the largest magnitude in the same scope, cells that are not valid included.
        min_range: see ``minmax_scale``.

    Returns:
        two tensors of the same shape; both 0 where the range counts as constant.
    """
    half_range = 0.5 * high - 0.5 * low
    floor = (0.5 * relative_floor(peak.dtype) * peak).clamp(min=0.5 * min_range)
    varies = half_range.detach() > floor  # False too for inf and -inf
    scale = torch.where(varies, 1.0 / torch.where(varies, half_range, 1.0), 0.0)
    return 0.5 * torch.where(varies, low, 0.0), scale


def minmax_scale(
    x: Tensor,
    *,
    scope: str = "channel",
    mask: Tensor | None = None,
    grad_through_extrema: bool = True,
    min_range: float = MIN_RANGE,
) -> Tensor:
    """Scale maps to [0, 1] by their smallest and largest value: (x - min) / (max - min).

    Args:
        x: (N, C, H, W) floating point, any finite values.
        scope: over what the extrema are taken: "channel" (each channel of each sample by itself),
            "sample" (all channels of a sample) or "batch" (everything).
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid. Extrema are taken over
            valid cells; the others are mapped alike and may leave [0, 1].
        grad_through_extrema: let the gradient reach min and max (shared between ties), or treat
            them as constants.
        min_range: a range max - min up to this one counts as constant, as does one within
            rounding noise of the largest magnitude in scope. Constant maps give 0, gradient 0.

    Returns:
        (N, C, H, W), float64 for float64 and float32 for all other input. Finite for finite input.

    Raises:
        ValueError: an unknown scope, or a map or mask of the wrong type or shape.
    """
    check_choice("scope", scope, SCOPES)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating point tensor (N, C, H, W); got {tuple(x.shape)} {x.dtype}"
        )
    mask = check_mask(mask, x)
    x = x.to(compute_dtype(x))
    if x.numel() == 0:
        return x * 1.0
    dims = SCOPE_DIMS[scope]
    source = x if grad_through_extrema else x.detach()
    if mask is None:
        low, high = source.amin(dims, keepdim=True), source.amax(dims, keepdim=True)
    else:
        invalid = ~mask[:, None]
        low = source.masked_fill(invalid, float("inf")).amin(dims, keepdim=True)
        high = source.masked_fill(invalid, float("-inf")).amax(dims, keepdim=True)
    peak = x.detach().abs().amax(dims, keepdim=True)
    half_low, scale = half_low_and_scale(low, high, peak, min_range)
    return (0.5 * x - half_low) * scale
