"""The Gaussian window and the windowed mean, with a reflected border.

The border is reflected without repeating the edge cell (... 2 1 | 0 1 2 ...). If the map is
narrower than the window, the reflection is folded repeatedly, so any length from 1 up works.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Cells of an axis that one matrix product computes. Longer blocks multiply more zeros of the band
# matrix, shorter ones are slower products.
BLOCK = 32


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

    Borders are folded into the matrix. Hence its transpose is the exact adjoint, and maps need no
    padding. Read-only.
    """
    radius = size // 2
    source = reflected_index(length, radius).unfold(0, length, 1)  # (size, length): cell seen
    weight = gaussian_window(size, sigma)[:, None].expand(size, length)
    output = torch.arange(length).expand(size, length)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.index_put_((output, source), weight, accumulate=True)


@lru_cache(maxsize=1024)  # multi-scale training has some hundred lengths
@torch.inference_mode(False)
def band_weights(
    length: int, size: int, sigma: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The band of ``band_matrix`` in two tables (length, size) float32, read-only.

    Returns:
        two tables. Row i of the first has the weights of cells i - r ... i + r in the mean of cell
        i, with r = size // 2; row i of the second has the weights of cell i in their means. The
        weights of cells outside are 0.
    """
    matrix, radius = band_matrix(length, size, sigma), size // 2
    near = torch.arange(length)[:, None] + torch.arange(-radius, radius + 1)
    exists = (near >= 0) & (near < length)
    near = near.clamp(0, length - 1)
    rows = torch.arange(length)[:, None].expand_as(near)
    outward, inward = matrix[rows, near] * exists, matrix[near, rows] * exists
    return outward.float().to(device), inward.float().to(device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _matrix(
    length: int, size: int, sigma: float, adjoint: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    matrix = band_matrix(length, size, sigma)
    return (matrix.t() if adjoint else matrix).to(device, dtype)


def _product(matrix: Tensor, x: Tensor, radius: int) -> Tensor:
    """``matrix`` @ ``x`` along the last but one axis, without the zeros far from the band."""
    length = len(matrix)
    if length <= 2 * BLOCK:
        return matrix @ x
    blocks = [
        (slice(start, start + BLOCK), slice(max(0, start - radius), start + BLOCK + radius))
        for start in range(0, length, BLOCK)
    ]
    return torch.cat([matrix[out, near] @ x[..., near, :] for out, near in blocks], dim=-2)


class _WindowedMean(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, size: int, sigma: float, adjoint: bool) -> Tensor:  # type: ignore[override]
        rows, columns = (
            _matrix(length, size, sigma, adjoint, x.dtype, x.device) for length in x.shape[-2:]
        )
        with torch.autocast(x.device.type, enabled=False):  # also for a backward under autocast
            return _product(rows, _product(columns, x.mT, size // 2).mT, size // 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.size, ctx.sigma, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _WindowedMean.apply(grad, ctx.size, ctx.sigma, not ctx.adjoint), None, None, None


def windowed_mean(x: Tensor, size: int, sigma: float, *, adjoint: bool = False) -> Tensor:
    """Gaussian mean around every cell of (..., H, W) maps: G_H @ x @ G_W^T, of the same shape.

    G is ``band_matrix``, transposed for the ``adjoint``. Differentiable any number of times.
    """
    return _WindowedMean.apply(x, size, sigma, adjoint)
