"""The Gaussian window along one axis, and the rule for what it sees beyond the border.

The border is reflected without repeating the edge cell (... 2 1 | 0 1 2 ...). Where the map is
narrower than the window the reflection is folded again and again, so any length from 1 up works.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def gaussian_window(size: int, sigma: float) -> Tensor:
    """Weights (size,) float64 of a Gaussian of ``sigma`` cells; they sum to 1. Read-only."""
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    return weight / weight.sum()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def reflected_index(length: int, radius: int) -> Tensor:
    """Cells (length + 2 radius,) int64 that positions -radius ... length-1+radius fold back to."""
    position = torch.arange(-radius, length + radius)
    if length == 1:
        return torch.zeros_like(position)
    period = 2 * (length - 1)
    position = position % period
    return torch.where(position < length, position, period - position)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def band_matrix(length: int, size: int, sigma: float) -> Tensor:
    """The windowed mean along an axis as a matrix (length, length) float64: mean = G @ values.

    Borders are folded into the matrix, hence its transpose is the exact adjoint and a map never
    has to be padded. Do not write to it.
    """
    radius = size // 2
    source = reflected_index(length, radius).unfold(0, length, 1)  # (size, length): cell seen
    weight = gaussian_window(size, sigma)[:, None].expand(size, length)
    output = torch.arange(length).expand(size, length)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.index_put_((output, source), weight, accumulate=True)


@lru_cache(maxsize=1024)  # training at many scales meets some hundred lengths
@torch.inference_mode(False)
def band_weights(
    length: int, size: int, sigma: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The band of ``band_matrix`` in two tables (length, size) float32, read-only.

    Returns:
        row i of the first holds the weights of cells i - r ... i + r in the mean of cell i, of the
        second the weights of cell i in their means; 0 for cells outside.
    """
    matrix, radius = band_matrix(length, size, sigma), size // 2
    near = torch.arange(length)[:, None] + torch.arange(-radius, radius + 1)
    exists = (near >= 0) & (near < length)
    near = near.clamp(0, length - 1)
    rows = torch.arange(length)[:, None].expand_as(near)
    outward, inward = matrix[rows, near] * exists, matrix[near, rows] * exists
    return outward.float().to(device), inward.float().to(device)
