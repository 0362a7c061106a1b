"""The mean over the valid cells of a batch of padded maps.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssim_kd.ops.options import check_map, check_mask, compute_dtype


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over samples of the mean over a sample's valid cells and channels.

    Every sample weighs the same, whatever its number of valid cells. Hence DDP, which averages
    over processes, gives the same loss as one process with the whole batch, as long as each
    sample has a valid cell.

    Args:
        values: (N, C, H, W) or (N, 1, H, W), floating point; for example a squared difference.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; None: all cells are.
            Samples without a valid cell are left out. Values of invalid cells have no effect,
            also if they are not finite.

    Returns:
        scalar, float32 (float64 for float64 input); 0, with a zero gradient, for empty ``values``
        or a mask without a valid cell.

    Raises:
        ValueError: ``values`` or ``mask`` has the wrong type, shape or device.

    Example:
        >>> values = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 100.0]]]])  # two maps of 1 x 2 cells
        >>> masked_mean(values, torch.tensor([[[True, True]], [[True, False]]]))  # (2 + 5) / 2
        tensor(3.5000)
    """
    check_map("values", values)
    mask = check_mask(mask, values)
    values = values.to(compute_dtype(values))
    if values.numel() == 0:
        return values.sum()
    weights = cell_weights(values, mask)
    if weights is None:
        return values.mean()
    weights = weights[:, None]
    # `where` first: 0 * inf would be NaN.
    return (torch.where(weights > 0, values, 0.0) * weights).sum()


def masked_sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over the valid cells of all samples, and over the channels.

    Args:
        values: (N, C, H, W), floating point. Values of invalid cells have no effect, also if they
            are not finite.
        mask: (N, H, W) or (N, 1, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: ``mask`` has the wrong type, shape or device.
    """
    mask = check_mask(mask, values)
    values = values.to(compute_dtype(values))
    return values.sum() if mask is None else values.masked_fill(~mask[:, None], 0.0).sum()


def valid_cells(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The valid cells of all samples, one after the other.

    Args:
        values: (N, C, H, W).
        mask: (N, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (M, C) for the M valid cells.

    Example:
        >>> values = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]])  # 1 x 2 cells of two channels
        >>> valid_cells(values, torch.tensor([[[False, True]]]))
        tensor([[3., 4.]])
    """
    cells = values.permute(0, 2, 3, 1)
    return cells.flatten(0, 2) if mask is None else cells[mask]


def cell_weights(x: Tensor, mask: Tensor | None, crop: int = 0) -> Tensor | None:
    """Weight of each cell in the mean over samples of the mean over valid cells and channels.

    Args:
        x: (N, C, H, W) maps.
        mask: (N, H, W) bool, True where a cell is valid, or None.
        crop: cells to leave out along each side.

    Returns:
        (N, H, W) float32 (float64 for float64 ``x``), the same for all channels. The sum over
        cells and channels is 1, or 0 without a valid cell. None if all N C H W elements weigh the
        same.
    """
    if mask is None and crop == 0:
        return None
    n, c, h, w = x.shape
    counted = torch.zeros(n, h, w, dtype=torch.bool, device=x.device)
    inside = (slice(None), slice(crop, h - crop), slice(crop, w - crop))
    counted[inside] = True if mask is None else mask[inside]
    cells = counted.sum(dim=(1, 2), keepdim=True)
    samples = (cells > 0).sum()
    dtype = compute_dtype(x)
    return counted.to(dtype) / (c * cells.clamp(min=1) * samples.clamp(min=1)).to(dtype)


def channel_moments(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the valid cells of the batch.

    Args:
        values: (N, C, H, W), floating point.
        mask: (N, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        two (1, C, 1, 1). The deviation has n - 1 in its denominator, and is 0 with a zero gradient
        for a channel that is constant and for less than two valid cells.

    Example:
        >>> values = torch.tensor([[[[1.0, 3.0, 9.0]]]])
        >>> mean, std = channel_moments(values, torch.tensor([[[True, True, False]]]))
        >>> mean.item(), round(std.item() ** 2, 4)
        (2.0, 2.0)
    """
    if mask is None:
        mask = torch.ones_like(values[:, 0], dtype=torch.bool)
    cells = mask[:, None].to(values.dtype)
    count = cells.sum()
    # `where` first: 0 * inf would be NaN.
    values = torch.where(mask[:, None], values, 0.0)
    mean = values.sum(dim=(0, 2, 3), keepdim=True) / count.clamp(min=1)
    squares = ((values - mean) * cells).square().sum(dim=(0, 2, 3), keepdim=True)
    variance = squares / (count - 1).clamp(min=1)
    # The root has no finite gradient at 0.
    constant = variance == 0
    return mean, torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())
