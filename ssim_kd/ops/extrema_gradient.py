"""The gradient of min-max scaling through the extrema, from two sums a plane.

For x^ = (x - low) / R, R = high - low, and g the gradient for x^:

    d/d low = (sum(g x^) - sum(g)) / R        d/d high = -sum(g x^) / R

The sums run over the scope, and what reaches an extremum is shared by the cells that tie for it.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plane_affine import PlaneRange


class ExtremaGradient:
    """Gathers the sums chunk by chunk and adds what the extrema receive.

    Args:
        planes: ranges of the student's planes by themselves.
        scoped: the same, joined over the scope.
        slope: (N, C), 1 / R, 0 where the range counts as constant.
        scope: "channel", "sample" or "batch".
        mask: (N, H, W) bool valid cells, or None.
    """

    def __init__(
        self,
        planes: PlaneRange,
        scoped: PlaneRange,
        slope: Tensor,
        scope: str,
        mask: Tensor | None,
    ):
        self.planes, self.scoped, self.slope = planes, scoped, slope
        self.scope, self.mask = scope, mask
        self.sum_g = torch.zeros_like(slope)
        self.sum_gx = torch.zeros_like(slope)

    def add_sums(self, at: slice, grad: Tensor, x: Tensor, shift: Tensor) -> None:
        """Sums of planes ``at``: ``grad`` (H, n W) for x^, ``x`` (H, n W) = x^ - ``shift`` (n,)."""
        h, n = grad.shape[0], shift.shape[0]
        sum_g = grad.view(h, n, -1).sum((0, 2))
        sum_gx = (grad * x).view(h, n, -1).sum((0, 2))
        self.sum_g.view(-1)[at] = sum_g
        self.sum_gx.view(-1)[at] = sum_gx + shift * sum_g

    def finish_chunk(self, at: slice, x: Tensor, grad: Tensor) -> None:
        """Complete the gradient of (n, H, W) planes now, in cache, if the scope is the channel."""
        if self.scope != "channel":
            return
        c = self.slope.shape[1]
        mask = None
        if self.mask is not None:  # then all planes of the chunk belong to one sample
            mask = self.mask[at.start // c]
        sum_g, sum_gx, slope, low, high = (
            v.reshape(-1)[at, None, None]
            for v in (self.sum_g, self.sum_gx, self.slope, self.scoped.low, self.scoped.high)
        )
        for extremum, gain in ((low, (sum_gx - sum_g) * slope), (high, -sum_gx * slope)):
            hit = _hits(x, extremum, mask)
            ties = hit.sum((1, 2), keepdim=True).clamp(min=1)
            grad.add_(torch.where(hit, gain / ties, 0.0).to(grad.dtype))

    def finish(self, x: Tensor, grad: Tensor) -> None:
        """Complete the gradient of the whole (N, C, H, W) map if the scope is a wider one."""
        if self.scope == "channel":
            return
        dims = (1,) if self.scope == "sample" else (0, 1)
        sum_g = self.sum_g.sum(dims, keepdim=True).expand_as(self.slope)
        sum_gx = self.sum_gx.sum(dims, keepdim=True).expand_as(self.slope)
        self._spread(x, grad, "low", (sum_gx - sum_g) * self.slope, dims)
        self._spread(x, grad, "high", -sum_gx * self.slope, dims)

    def _spread(
        self, x: Tensor, grad: Tensor, which: str, gain: Tensor, dims: tuple[int, ...]
    ) -> None:
        """Add ``gain`` (N, C) to the cells at the extremum of the scope, shared between ties."""
        extremum = getattr(self.scoped, which)
        holds = getattr(self.planes, which) == extremum  # most planes hold no extremum
        if x.device.type == "cpu":
            places: list[tuple[int | slice, ...]] = [tuple(i) for i in holds.nonzero().tolist()]
        else:  # without asking the device: all planes, a sample at a time
            places = [(n,) for n in range(x.shape[0])]
        ties = torch.zeros_like(gain)
        for place in places:
            ties[place] = self._hits_at(x, place, extremum).sum((-2, -1)).to(ties.dtype)
        share = gain / ties.sum(dims, keepdim=True).clamp(min=1)
        for place in places:
            hit = self._hits_at(x, place, extremum)
            grad[place] += torch.where(hit, share[place][..., None, None], 0.0).to(grad.dtype)

    def _hits_at(self, x: Tensor, place: tuple[int | slice, ...], extremum: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask[place[0]]
        return _hits(x[place], extremum[place][..., None, None], mask)


def _hits(x: Tensor, extremum: Tensor, mask: Tensor | None) -> Tensor:
    """Valid cells of planes (..., H, W) that equal their ``extremum``, which came from them."""
    hit = x == extremum.to(x.dtype)
    return hit if mask is None else hit & mask
