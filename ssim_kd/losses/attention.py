"""Attention maps: where, and in which channels, a map is large.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssim_kd.ops.options import check_mask, compute_dtype


def masked_softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the valid cells of each plane.

    Args:
        logits: (N, C, H, W), floating point.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (N, C, H, W), float32 (float64 for float64 input); each plane sums to 1. 0 in invalid cells,
        and everywhere in a sample without valid cells.

    Raises:
        ValueError: ``mask`` has the wrong type, shape or device.
    """
    mask = check_mask(mask, logits)
    found = masked_log_softmax(logits, mask).exp()
    return found if mask is None else found.masked_fill(~mask[:, None], 0.0)


def masked_log_softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logarithm of :func:`masked_softmax`, but 0 in invalid cells, whose logarithm has no value.

    Arguments and errors as there.
    """
    mask = check_mask(mask, logits)
    x = logits.to(compute_dtype(logits))
    if mask is None:
        return x.flatten(2).log_softmax(dim=2).view_as(x)
    padding = ~mask[:, None]
    # Finite, so that a sample without valid cells has no NaN in its gradient.
    x = x.masked_fill(padding, torch.finfo(x.dtype).min / 2)
    return x.flatten(2).log_softmax(dim=2).view_as(x).masked_fill(padding, 0.0)


def spatial_attention(x: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """G_s = HW softmax over the cells of (mean over the channels of \\|x\\| / temperature).

    From "Improve Object Detection with Feature-based Knowledge Distillation" (Zhang & Ma, ICLR
    2021), eq. 1 and 2, and FGD (Yang et al., CVPR 2022), eq. 5 and 7.

    Args:
        x: (N, C, H, W), floating point.
        temperature: > 0; the smaller, the sharper.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (N, 1, H, W), float32 (float64 for float64 input), mean 1 over the valid cells of a sample,
        0 in the others. The gradient reaches ``x``; detach it if the method does.

    Raises:
        ValueError: ``mask`` has the wrong type, shape or device.

    Example:
        >>> x = torch.tensor([[[[0.0, 3.0]]]]).log1p()  # |x| = 0, log 4
        >>> spatial_attention(x, temperature=1.0)  # 2 * (1, 4) / 5
        tensor([[[[0.4000, 1.6000]]]])
    """
    x = x.to(compute_dtype(x))
    mask = check_mask(mask, x)
    cells = x.shape[2] * x.shape[3] if mask is None else mask.sum(dim=(1, 2)).view(-1, 1, 1, 1)
    return cells * masked_softmax(x.abs().mean(dim=1, keepdim=True) / temperature, mask)


def channel_attention(x: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """G_c = C softmax over the channels of (mean over the cells of \\|x\\| / temperature).

    Source as of :func:`spatial_attention`.

    Args:
        x: (N, C, H, W), floating point.
        temperature: > 0; the smaller, the sharper.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (N, C, 1, 1), float32 (float64 for float64 input), mean 1 over the channels of a sample.

    Raises:
        ValueError: ``mask`` has the wrong type, shape or device.
    """
    x = x.to(compute_dtype(x))
    means = cell_means(x.abs(), mask)
    return x.shape[1] * (means / temperature).softmax(dim=1)[..., None, None]


def cell_means(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of each channel over a sample's valid cells: global average pooling of a padded map.

    Args:
        x: (N, C, H, W), floating point.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (N, C), float32 (float64 for float64 input); 0 for a sample without valid cells.

    Raises:
        ValueError: ``mask`` has the wrong type, shape or device.
    """
    mask = check_mask(mask, x)
    x = x.to(compute_dtype(x))
    if mask is None:
        return x.mean(dim=(2, 3))
    total = x.masked_fill(~mask[:, None], 0.0).sum(dim=(2, 3))
    return total / mask.sum(dim=(1, 2)).clamp(min=1)[:, None]
