"""The l1 and l2 losses that the paper compares SSIM with.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssim_kd.ops.cells import cell_weights, check_maps, check_mask, compute_dtype
from ssim_kd.ops.options import SCOPES, check_choice
from ssim_kd.ops.scaling import minmax_scale


def lp_loss(
    input: Tensor,
    target: Tensor,
    *,
    p: int = 2,
    scaling: str | None = None,
    scaling_grad: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """mean |psi(S) - psi(T)|^p over all elements, with no root and no factor 1/2.

    Args:
        input: the student's map S, (N, C, H, W), floating point.
        target: the teacher's map T, the same shape; treated as a constant.
        p: 1 or 2.
        scaling: None (psi is the identity) or the scope of ``minmax_scale``: "channel", "sample",
            "batch". Both maps are scaled, each by its own extrema.
        scaling_grad: let the gradient through the student's extrema.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid. The mean is then the mean
            over samples of the mean over a sample's valid cells; samples without any are left out.

    Returns:
        scalar >= 0, float32 (float64 for float64 input). 0, with a zero gradient, for an empty
        batch or a mask without any valid cell.

    Raises:
        ValueError: an unknown ``p`` or ``scaling``, or tensors that do not fit together.
    """
    check_choice("p", p, (1, 2))
    check_choice("scaling", scaling, (None, *SCOPES))
    check_maps(input, target)
    mask = check_mask(mask, input)
    x, y = input.to(compute_dtype(input)), target.detach().to(compute_dtype(input))
    if x.numel() == 0:
        return x.sum() * 0.0
    if scaling is not None:
        x = minmax_scale(x, scope=scaling, mask=mask, grad_through_extrema=scaling_grad)
        y = minmax_scale(y, scope=scaling, mask=mask)
    difference = x - y
    weights = cell_weights(x.shape, x, mask, crop=0)
    if weights is not None:
        # Before the power: an infinity in a padded cell must not become 0 * inf in the gradient.
        difference = torch.where(weights[:, None] > 0, difference, 0.0)
    error = difference.abs() if p == 1 else difference**2
    return error.mean() if weights is None else (error * weights[:, None]).sum()


class LpLoss(nn.Module):
    """``lp_loss`` with its options fixed, checked when it is made."""

    def __init__(self, *, p: int = 2, scaling: str | None = None, scaling_grad: bool = True):
        super().__init__()
        check_choice("p", p, (1, 2))
        check_choice("scaling", scaling, (None, *SCOPES))
        self.p, self.scaling, self.scaling_grad = p, scaling, scaling_grad

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """See ``lp_loss``."""
        return lp_loss(
            input,
            target,
            p=self.p,
            scaling=self.scaling,
            scaling_grad=self.scaling_grad,
            mask=mask,
        )

    def extra_repr(self) -> str:
        """Give the options for ``repr``."""
        return f"p={self.p}, scaling={self.scaling!r}, scaling_grad={self.scaling_grad}"
