"""The value range of every plane, and the affine map that the fast losses apply to it on loading.

A plane is one channel of one sample. Min-max scaling, and the power of two that keeps huge maps
away from overflow, both are (x / 2 - half_low) * scale with numbers that are constant in a plane.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import compute_dtype
from .options import SSIMOptions
from .scaling import half_low_and_scale
from .ssim_reference import MIN_CONSTANT, power_of_two_unit


class PlaneRange(NamedTuple):
    """Extrema over valid cells and largest magnitude over all cells, each (N, C)."""

    low: Tensor
    high: Tensor
    peak: Tensor


class PlaneAffine(NamedTuple):
    """A loaded value is (x / 2 - half_low) * scale; each is (N, C)."""

    half_low: Tensor
    scale: Tensor


class PlaneConstants(NamedTuple):
    """C1, C2 and eps of SSIM, by plane, each (N, C)."""

    c1: Tensor
    c2: Tensor
    eps: Tensor


def plane_range(x: Tensor, mask: Tensor | None = None) -> PlaneRange:
    """Ranges of (N, C, H, W) maps; ``mask`` is (N, H, W) bool. No copy of the whole map is made."""
    dtype = compute_dtype(x)
    # Two passes on purpose: on a CPU aminmax over dimensions is several times slower.
    low, high = x.amin((2, 3)).to(dtype), x.amax((2, 3)).to(dtype)
    peak = torch.maximum(low.abs(), high.abs())
    if mask is None:
        return PlaneRange(low, high, peak)
    low, high = torch.empty_like(low), torch.empty_like(high)
    for n, sample in enumerate(x):
        low[n] = sample.masked_fill(~mask[n], float("inf")).amin((1, 2))
        high[n] = sample.masked_fill(~mask[n], float("-inf")).amax((1, 2))
    return PlaneRange(low, high, peak)


def over_scope(x: Tensor, scope: str, largest: bool) -> Tensor:
    """Smallest or largest of (N, C) numbers over a scope of ``minmax_scale``, as (N, C)."""
    if scope == "channel":
        return x
    dims = (1,) if scope == "sample" else (0, 1)
    reduced = x.amax(dims, keepdim=True) if largest else x.amin(dims, keepdim=True)
    return reduced.expand_as(x)


def scope_range(planes: PlaneRange, scope: str) -> PlaneRange:
    """Ranges of planes joined over the scope, still one entry a plane."""
    return PlaneRange(
        over_scope(planes.low, scope, largest=False),
        over_scope(planes.high, scope, largest=True),
        over_scope(planes.peak, scope, largest=True),
    )


def minmax_affine(scoped: PlaneRange) -> PlaneAffine:
    """Min-max scaling to [0, 1]; the same rule as ``minmax_scale``."""
    return PlaneAffine(*half_low_and_scale(scoped.low, scoped.high, scoped.peak))


def unit_affine(peak: Tensor, options: SSIMOptions) -> tuple[PlaneAffine, PlaneConstants]:
    """Powers of two, 1 except for huge planes, and SSIM's constants in the units they make.

    Args:
        peak: (N, C), the largest magnitude in the planes of both maps.
        options: of the loss.
    """
    unit = power_of_two_unit(peak)
    return PlaneAffine(torch.zeros_like(unit), 2.0 * unit), plane_constants(unit, options)


def plane_constants(unit: Tensor, options: SSIMOptions) -> PlaneConstants:
    """SSIM's constants where values were multiplied by ``unit`` (N, C)."""
    smallest = torch.where(unit < 1, MIN_CONSTANT, 0.0).to(unit.dtype)
    return PlaneConstants(
        torch.maximum(options.c1 * unit**2, smallest),
        torch.maximum(options.c2 * unit**2, smallest),
        options.eps * unit**4,
    )
