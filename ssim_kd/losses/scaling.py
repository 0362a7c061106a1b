"""Min-max scaling of feature maps to [0, 1], the paper's psi.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from torch import Tensor

from ssim_kd.ops.min_max import MIN_RANGE, half_low_and_scale
from ssim_kd.ops.options import SCOPES, check_choice, check_map, check_mask, compute_dtype

SCOPE_DIMS = {"channel": (2, 3), "sample": (1, 2, 3), "batch": (0, 1, 2, 3)}


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
        scope: the cells that share extrema: "channel" (each channel of each sample), "sample" (all
            channels of a sample) or "batch" (all).
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid. Extrema are taken over
            valid cells. Invalid cells are scaled alike and may leave [0, 1].
        grad_through_extrema: differentiate through min and max (ties share the gradient), or treat
            them as constants.
        min_range: a range max - min up to this one counts as constant, as does one within
            rounding noise of the largest magnitude in scope. Constant maps give 0, gradient 0.

    Returns:
        (N, C, H, W), float32 (float64 for float64 input). Finite for finite input.

    Raises:
        ValueError: an unknown scope, or a map or mask of the wrong type or shape.

    Example:
        >>> minmax_scale(torch.tensor([[[[1.0, 2.0, 5.0]]]]))
        tensor([[[[0.0000, 0.2500, 1.0000]]]])
    """
    check_choice("scope", scope, SCOPES)
    check_map("x", x)
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
