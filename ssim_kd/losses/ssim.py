"""The SSIM feature loss of de Rijk et al., "Structural Knowledge Distillation for Object
Detection", NeurIPS 2022: for one map, for a whole pyramid, and as a module.

Shapes: N images, C channels, H x W cells, L levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssim_kd.ops.cells import cell_weights, check_maps, check_mask, compute_dtype
from ssim_kd.ops.closed_form import closed_form_loss
from ssim_kd.ops.dispatch import choose_impl
from ssim_kd.ops.options import SSIMOptions, check_ssim_options
from ssim_kd.ops.scaling import minmax_scale
from ssim_kd.ops.ssim_reference import ssim_map_reference


def ssim_loss(
    input: Tensor,
    target: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    padding: str = "same",
    scaling: str | None = None,
    scaling_grad: bool = True,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """(1 - SSIM) / 2 of the student's map against the teacher's, averaged over all elements.

    SSIM = l^alpha c^beta s^gamma, from the moments of each channel by itself in a Gaussian window.
    The moments are float32 also for half-precision maps and under autocast.

    Args:
        input: the student's map, (N, C, H, W), floating point, contiguous or channels-last.
        target: the teacher's map, the same shape; always treated as a constant.
        window_size: side of the window in cells, odd.
        sigma: standard deviation of the Gaussian window in cells.
        data_range: L, the range of the values; 1 after scaling. C1 = (k1 L)^2, C2 = (k2 L)^2.
        k1, k2: constants >= 0 that steady the quotients where means or variances vanish.
        alpha, beta, gamma: exponents >= 0 of luminance, contrast and structure; 0 drops the term.
            With beta = gamma no square root is taken. For an exponent that is no integer v^p means
            sign(v) |v|^p, rounded off near 0, because luminance and structure can be negative.
        padding: "same": the border is reflected (without its edge cell), folded as often as a map
            narrower than the window needs, down to 1 x 1. "valid": only cells whose window lies
            inside count; a map smaller than the window is treated as "same".
        scaling: None, or the scope of the min-max scaling of both maps to [0, 1]: "channel" (each
            channel of each sample), "sample" or "batch". See ``minmax_scale``.
        scaling_grad: let the gradient through the student's extrema.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid, False where it is padding.
            Extrema are taken over valid cells, and the loss is the mean over samples of the mean
            over a sample's valid cells and channels; samples without any are left out. Windows of
            valid cells near padding still see the padded cells.
        impl: "auto", or "reference" (autograd over convolutions, any arguments), "eager" (torch
            calls, any device), "native" (C, for a CPU) or "triton" (CUDA and ROCm). "auto" takes
            the fastest that supports the arguments, as a rule, and says in the log, once, which.
            Exponents other than 1 take "reference" whatever is named here; the log says so.

    Returns:
        scalar in about [0, 1], float32 (float64 for float64 input). Not clamped: a clamp would
        kill gradients where rounding takes it past its end. For an empty batch or a mask without
        a valid cell it is 0 with a zero gradient. It is finite, and so is its gradient, for
        finite input: maps beyond 2^20 are made smaller first, and C1 and C2 with them.

    Raises:
        ValueError: an option out of range or unknown, or tensors that do not fit together.
        RuntimeError: an explicit ``impl`` that cannot be had.
    """
    options = SSIMOptions(
        window_size=window_size,
        sigma=sigma,
        data_range=data_range,
        k1=k1,
        k2=k2,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        padding=padding,
        scaling=scaling,
        scaling_grad=scaling_grad,
        impl=impl,
    )
    return _pyramid([input], [target], [mask], [1.0], options)[0]


def pyramid_ssim_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None] | None = None,
    level_weights: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over levels of ``ssim_loss``, in one call and one autograd node.

    Args:
        inputs: the student's L maps, (N, C, H, W) each, sizes as they are.
        targets: the teacher's L maps, of the same shapes.
        masks: L masks as in ``ssim_loss`` (None for a level without), or None for none at all.
        level_weights: L finite weights, or None for 1 each.
        options: those of ``ssim_loss``.

    Returns:
        (total, levels): the scalar to differentiate, and the (L,) detached unweighted losses.

    Raises:
        ValueError: as ``ssim_loss``, or lists of unequal length, or of none.
        RuntimeError: an explicit ``impl`` that cannot be had.
    """
    checked = check_ssim_options(**options)
    if len(inputs) == 0:
        raise ValueError("pyramid_ssim_loss needs at least one level; got none")
    masks = [None] * len(inputs) if masks is None else masks
    weights = [1.0] * len(inputs) if level_weights is None else list(level_weights)
    for name, values in (("targets", targets), ("masks", masks), ("level_weights", weights)):
        if len(values) != len(inputs):
            raise ValueError(f"{name} must have {len(inputs)} levels as inputs; got {len(values)}")
    return _pyramid(inputs, targets, masks, weights, checked)


def _pyramid(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    level_weights: Sequence[float],
    options: SSIMOptions,
) -> tuple[Tensor, Tensor]:
    for x, y in zip(inputs, targets, strict=True):
        check_maps(x, y)
    masks = [check_mask(mask, x) for mask, x in zip(masks, inputs, strict=True)]
    run = choose_impl(list(inputs), options)
    if run is not None:
        return closed_form_loss(run, inputs, targets, masks, level_weights, options)
    losses = [_reference(*level, options) for level in zip(inputs, targets, masks, strict=True)]
    total = torch.stack([w * v for w, v in zip(level_weights, losses, strict=True)]).sum()
    return total, torch.stack([v.detach() for v in losses])


def _reference(x: Tensor, y: Tensor, mask: Tensor | None, options: SSIMOptions) -> Tensor:
    x, y = x.to(compute_dtype(x)), y.detach().to(compute_dtype(x))
    if x.numel() == 0:
        return x.sum() * 0.0
    if options.scaling is not None:
        x = minmax_scale(
            x, scope=options.scaling, mask=mask, grad_through_extrema=options.scaling_grad
        )
        y = minmax_scale(y, scope=options.scaling, mask=mask)
    ssim = ssim_map_reference(x, y, options)
    weights = cell_weights(x.shape, x, mask, options.crop(*x.shape[2:]))
    if weights is None:
        return 0.5 * (1.0 - ssim).mean()
    return 0.5 * torch.where(weights[:, None] > 0, (1.0 - ssim) * weights[:, None], 0.0).sum()


class SSIMLoss(nn.Module):
    """``ssim_loss`` with its options fixed, checked when it is made."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = check_ssim_options(**options)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """See ``ssim_loss``."""
        return _pyramid([input], [target], [mask], [1.0], self.options)[0]

    def extra_repr(self) -> str:
        """Give the options for ``repr``."""
        return ", ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self.options).items())
