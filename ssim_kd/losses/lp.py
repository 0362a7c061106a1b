"""The l1 and l2 losses, to which the paper compares SSIM.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from torch import Tensor, nn

from ssim_kd.ops.options import SCOPES, check_choice, check_maps, check_mask, compute_dtype

from .masking import masked_mean
from .scaling import minmax_scale


def lp_loss(
    input: Tensor,
    target: Tensor,
    *,
    p: int = 2,
    scaling: str | None = None,
    scaling_grad: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """mean |psi(S) - psi(T)|^p over all elements, without a root or a factor 1/2.

    Args:
        input: the student's map S, (N, C, H, W), floating point.
        target: the teacher's map T, the same shape; a constant.
        p: 1 or 2.
        scaling: None (psi is the identity) or the scope of ``minmax_scale``: "channel", "sample",
            "batch". Each map is scaled by its own extrema.
        scaling_grad: differentiate through the student's extrema.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; see ``masked_mean``.

    Returns:
        scalar >= 0, float32 (float64 for float64 input). 0, with a zero gradient, for an empty
        batch or a mask without a valid cell.

    Raises:
        ValueError: an unknown ``p`` or ``scaling``, or tensors that do not fit together.

    Example:
        >>> student, teacher = torch.zeros(2, 256, 25, 42), torch.ones(2, 256, 25, 42)
        >>> lp_loss(student, teacher, p=1)
        tensor(1.)
    """
    check_choice("p", p, (1, 2))
    check_choice("scaling", scaling, (None, *SCOPES))
    check_maps(input, target)
    mask = check_mask(mask, input)
    x, y = input.to(compute_dtype(input)), target.detach().to(compute_dtype(input))
    if scaling is not None:
        x = minmax_scale(x, scope=scaling, mask=mask, grad_through_extrema=scaling_grad)
        y = minmax_scale(y, scope=scaling, mask=mask)
    difference = x - y
    if mask is not None:  # before the power, whose gradient at an infinite value is not finite
        difference = difference.masked_fill(~mask[:, None], 0.0)
    return masked_mean(difference.abs() if p == 1 else difference**2, mask)


class LpLoss(nn.Module):
    """``lp_loss`` with fixed options, which are checked by the constructor."""

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
        """The options, for ``repr``."""
        return f"p={self.p}, scaling={self.scaling!r}, scaling_grad={self.scaling_grad}"
