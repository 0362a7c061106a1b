"""The SSIM feature loss: for one map, for a pyramid, as a module, and cell by cell.

Source: de Rijk et al., "Structural Knowledge Distillation for Object Detection", NeurIPS 2022.

Shapes: N images, C channels, H x W cells, L levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ssim_kd.ops.autograd import LevelInputs, closed_form_loss
from ssim_kd.ops.options import SSIMOptions, check_maps, check_mask, compute_dtype
from ssim_kd.ops.reference import SSIMComponents, ssim, ssim_components
from ssim_kd.ops.select import check_ssim_options, choose_impl

from .masking import cell_weights
from .scaling import minmax_scale


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
    """(1 - SSIM) / 2 of the student's map and the teacher's, averaged over all elements.

    SSIM = l^alpha c^beta s^gamma (luminance, contrast, structure), from the moments of each channel
    in a Gaussian window. The moments are float32 also for half-precision maps and under autocast.

    Args:
        input: the student's map, (N, C, H, W), floating point, contiguous or channels-last.
        target: the teacher's map, the same shape; a constant.
        window_size: side of the window in cells, odd.
        sigma: standard deviation of the Gaussian window in cells.
        data_range: L, the range of the values; 1 after scaling. C1 = (k1 L)^2, C2 = (k2 L)^2.
        k1, k2: constants >= 0 that keep the quotients stable where means or variances vanish.
        alpha, beta, gamma: exponents >= 0 of luminance, contrast and structure; 0 drops the term.
            With beta = gamma no square root is taken. Luminance and structure can be negative: for
            a non-integer exponent v^p means sign(v) |v|^p, smoothed near 0.
        padding: "same" reflects the border without the edge cell, repeatedly if the map is narrower
            than the window, down to 1 x 1. "valid" counts only cells whose window lies inside; a
            map smaller than the window is treated as "same".
        scaling: None, or the scope of the min-max scaling of both maps to [0, 1]: "channel" (each
            channel of each sample), "sample" or "batch". See ``minmax_scale``.
        scaling_grad: differentiate through the student's extrema.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid, False where it is padding.
            Extrema are taken over valid cells, and the loss is averaged as by ``masked_mean``.
            Windows of valid cells near padding include padded cells.
        impl: "native" (C kernels, CPU), "triton" (CUDA and ROCm), "eager" (PyTorch, any device),
            "reference" (autograd; slower, about 12 maps of memory, but with a second derivative) or
            "auto", the fastest that is available; the choice is logged once. Exponents other than 1
            always use "reference", which is logged.

    Returns:
        scalar in about [0, 1], float32 (float64 for float64 input). It is not clamped: a clamp
        would zero gradients where rounding exceeds the range. 0, with a zero gradient, for an empty
        batch or a mask without a valid cell. Loss and gradient are finite for values up to 1e6 in
        magnitude, and for any finite values if ``scaling`` is set.

    Raises:
        ValueError: an option out of range or unknown, or tensors that do not fit together.
        RuntimeError: the implementation that ``impl`` names is not available.

    Example:
        >>> student = torch.rand(2, 256, 25, 42, requires_grad=True)
        >>> teacher = torch.rand(2, 256, 25, 42)
        >>> ssim_loss(student, teacher, scaling="channel").backward()
        >>> ssim_loss(teacher, teacher).abs() < 1e-6
        tensor(True)
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
    """The weighted sum of ``ssim_loss`` over the levels of a pyramid, in one autograd node.

    Args:
        inputs: the student's L maps, (N, C, H, W) each; sizes may differ between levels.
        targets: the teacher's L maps, of the same shapes.
        masks: L masks as in ``ssim_loss`` (None for a level without one), or None.
        level_weights: L finite weights; None: 1 for each level.
        options: those of ``ssim_loss``.

    Returns:
        (total, levels): the scalar to differentiate, and the (L,) detached unweighted losses.

    Raises:
        ValueError: as ``ssim_loss``, or lists that are empty or differ in length.
        RuntimeError: as ``ssim_loss``.

    Example:
        >>> student = [torch.rand(2, 256, s, s, requires_grad=True) for s in (32, 16, 8)]
        >>> teacher = [torch.rand(2, 256, s, s) for s in (32, 16, 8)]
        >>> total, levels = pyramid_ssim_loss(student, teacher, scaling="channel")
        >>> levels.shape
        torch.Size([3])
    """
    checked = check_ssim_options(**options)
    if len(inputs) == 0:
        raise ValueError("inputs must have at least one level; got 0")
    masks = [None] * len(inputs) if masks is None else masks
    weights = [1.0] * len(inputs) if level_weights is None else list(level_weights)
    for name, values in (("targets", targets), ("masks", masks), ("level_weights", weights)):
        if len(values) != len(inputs):
            raise ValueError(
                f"{name} must have {len(inputs)} levels, as inputs has; got {len(values)}"
            )
    return _pyramid(inputs, targets, masks, weights, checked)


def _pyramid(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    level_weights: Sequence[float],
    options: SSIMOptions,
) -> tuple[Tensor, Tensor]:
    levels = []
    for x, y, mask in zip(inputs, targets, masks, strict=True):
        check_maps(x, y)
        mask = check_mask(mask, x)
        weights = cell_weights(x, mask, options.crop(*x.shape[2:]))
        levels.append(LevelInputs(x, y, mask, weights, need_grad=False))
    run = choose_impl(inputs, options)
    if run is not None:
        return closed_form_loss(run, levels, level_weights, options)
    losses = [_reference(level, options) for level in levels]
    total = torch.stack([w * v for w, v in zip(level_weights, losses, strict=True)]).sum()
    return total, torch.stack([v.detach() for v in losses])


def _reference(level: LevelInputs, options: SSIMOptions) -> Tensor:
    if level.x.numel() == 0:
        return level.x.to(compute_dtype(level.x)).sum()
    loss = 0.5 * (1.0 - ssim(*_scaled(level.x, level.y, level.mask, options), options))
    if level.weights is None:
        return loss.mean()
    weights = level.weights[:, None]
    return torch.where(weights > 0, weights * loss, 0.0).sum()


def _scaled(
    x: Tensor, y: Tensor, mask: Tensor | None, options: SSIMOptions
) -> tuple[Tensor, Tensor]:
    """Both maps in float32 or float64, min-max scaled as the options say; ``y`` detached."""
    x, y = x.to(compute_dtype(x)), y.detach().to(compute_dtype(x))
    scope = options.scaling
    if scope is None:
        return x, y
    through = options.scaling_grad
    x = minmax_scale(x, scope=scope, mask=mask, grad_through_extrema=through)
    return x, minmax_scale(y, scope=scope, mask=mask)


class SSIMLoss(nn.Module):
    """``ssim_loss`` with fixed options, which are checked by the constructor.

    Example:
        >>> loss = SSIMLoss(scaling="channel")
        >>> value = loss(torch.rand(2, 256, 25, 42), torch.rand(2, 256, 25, 42))
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = check_ssim_options(**options)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """See ``ssim_loss``."""
        return _pyramid([input], [target], [mask], [1.0], self.options)[0]

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return ", ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self.options).items())


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
        target: the teacher's map, the same shape; a constant.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; used by the scaling.
        components: return luminance, contrast and structure, without their exponents, instead.
        options: those of ``ssim_loss``. ``impl`` has no effect: this is always the reference.

    Returns:
        (N, C, H, W) float32 (float64 for float64 input) in about [-1, 1], 1 where the maps are
        equal; or ``SSIMComponents`` of three such maps. For padding "valid", each side is cut by
        the radius of the window if the map is at least as large as the window.

    Raises:
        ValueError: as ``ssim_loss``.
    """
    checked = check_ssim_options(**{**options, "impl": "reference"})
    check_maps(input, target)
    x, y = _scaled(input, target, check_mask(mask, input), checked)
    if x.numel() == 0:
        empty = x * 1.0
        return SSIMComponents(empty, empty, empty) if components else empty
    crop = checked.crop(*x.shape[2:])
    inside = (..., slice(crop, x.shape[2] - crop), slice(crop, x.shape[3] - crop))
    if components:
        return SSIMComponents(*(part[inside] for part in ssim_components(x, y, checked)))
    return ssim(x, y, checked)[inside]
