"""Min-max scaling plane by plane: ranges, factors, and the gradient through the extrema.

A plane is one channel of one sample. Numbers by plane are (N, C); after joining over a scope
("channel", "sample" or "batch") they are still (N, C), with equal entries within the scope.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .options import compute_dtype

# A range up to this one counts as constant. Activations are of the order of 1, so a range of 1e-4
# is rounding noise or a dead channel; scaling it to 1 would multiply gradients by more than 1e4.
MIN_RANGE = 1e-4


class PlaneRange(NamedTuple):
    """Extrema over valid cells, and the largest magnitude over all cells; each (N, C)."""

    low: Tensor
    high: Tensor
    peak: Tensor


def relative_floor(dtype: torch.dtype) -> float:
    """The smallest range, relative to the largest magnitude, that is more than rounding noise."""
    return 4 * torch.finfo(dtype).eps


def half_low_and_scale(
    low: Tensor, high: Tensor, peak: Tensor, min_range: float = MIN_RANGE
) -> tuple[Tensor, Tensor]:
    """``low / 2`` and ``2 / (high - low)``, so that (x / 2 - low / 2) * scale lies in [0, 1].

    The halves avoid the overflow of high - low for finite values of opposite sign.

    Args:
        low, high: extrema, any shape; inf and -inf if there was no valid cell.
        peak: the largest magnitude in the same scope, invalid cells included.
        min_range: see ``minmax_scale``.

    Returns:
        two tensors of the same shape; both are 0 where the range counts as constant.
    """
    half_range = 0.5 * high - 0.5 * low
    floor = (0.5 * relative_floor(peak.dtype) * peak).clamp(min=0.5 * min_range)
    varies = half_range.detach() > floor  # False also for inf and -inf
    scale = torch.where(varies, 1.0 / torch.where(varies, half_range, 1.0), 0.0)
    return 0.5 * torch.where(varies, low, 0.0), scale


def plane_range(x: Tensor, mask: Tensor | None = None) -> PlaneRange:
    """Ranges of (N, C, H, W) maps; ``mask`` is (N, H, W) bool, True where a cell is valid."""
    dtype = compute_dtype(x)
    # On a CPU, aminmax over several axes takes several times as long as amin and amax.
    low, high = x.amin((2, 3)).to(dtype), x.amax((2, 3)).to(dtype)
    peak = torch.maximum(low.abs(), high.abs())
    if mask is None:
        return PlaneRange(low, high, peak)
    low, high = torch.empty_like(low), torch.empty_like(high)
    for n, sample in enumerate(x):  # a copy of one sample at a time
        low[n] = sample.masked_fill(~mask[n], float("inf")).amin((1, 2))
        high[n] = sample.masked_fill(~mask[n], float("-inf")).amax((1, 2))
    return PlaneRange(low, high, peak)


def _over_scope(values: Tensor, scope: str, reduce: Callable[..., Tensor]) -> Tensor:
    if scope == "channel":
        return values
    return reduce(values, (1,) if scope == "sample" else (0, 1), keepdim=True).expand_as(values)


def scope_range(planes: PlaneRange, scope: str) -> PlaneRange:
    """Ranges of planes joined over the scope."""
    low, high, peak = planes
    reductions = ((low, torch.amin), (high, torch.amax), (peak, torch.amax))
    return PlaneRange(*(_over_scope(values, scope, reduce) for values, reduce in reductions))


def add_extrema_gradient(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    planes: PlaneRange,
    scope: str,
    slope: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
) -> None:
    """Add to ``grad``, in place, what reaches ``x`` through the extrema of the min-max scaling.

    With x^ = (x - low) / R, R = high - low, and g the gradient for x^:

        d/d low = (sum(g x^) - sum(g)) / R        d/d high = -sum(g x^) / R

    The sums are over the scope. Cells that tie for an extremum share its gradient.

    Args:
        grad: (N, C, H, W), the gradient for ``x`` with constant extrema.
        x: (N, C, H, W) maps.
        mask: (N, H, W) bool valid cells, or None.
        planes: ranges of ``x`` by plane.
        scope: "channel", "sample" or "batch".
        slope: (N, C), 1 / R, 0 where the range counts as constant.
        sum_g, sum_gx: (N, C), sums over each plane of g and g x^.
    """
    scoped = scope_range(planes, scope)
    sum_g, sum_gx = (_over_scope(values, scope, torch.sum) for values in (sum_g, sum_gx))
    for own, extremum, gain in (
        (planes.low, scoped.low, (sum_gx - sum_g) * slope),
        (planes.high, scoped.high, -sum_gx * slope),
    ):
        at: list[tuple[int | slice, ...]] = [(n,) for n in range(len(x))]
        if scope == "channel":
            at = [(slice(None),)]
        elif x.device.type == "cpu":  # few planes have an extremum; elsewhere this would wait
            at = [tuple(place) for place in (own == extremum).nonzero().tolist()]
        ties = torch.zeros_like(gain)
        for place in at:
            ties[place] = _hits(x, mask, extremum, place).sum((-2, -1)).to(ties.dtype)
        share = gain / _over_scope(ties, scope, torch.sum).clamp(min=1)
        for place in at:
            hits = _hits(x, mask, extremum, place)
            grad[place] += torch.where(hits, share[place][..., None, None], 0.0).to(grad.dtype)


def _hits(
    x: Tensor, mask: Tensor | None, extremum: Tensor, place: tuple[int | slice, ...]
) -> Tensor:
    """Valid cells of the planes at ``place`` that are equal to the extremum of their scope."""
    hits = x[place] == extremum[place][..., None, None].to(x.dtype)
    if mask is None:
        return hits
    valid = mask[place[0]]
    return hits & (valid[:, None] if hits.dim() == 4 else valid)
