"""The SSIM loss and its gradient by PyTorch calls, on any device.

It processes a few planes at a time: they stay in cache, and only the gradient has the size of a
map. ``autograd.py`` has the notation and the algebra.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .autograd import LevelInputs, LevelResult, empty_result, grad_dtype
from .min_max import PlaneRange, add_extrema_gradient, half_low_and_scale, plane_range, scope_range
from .options import SSIMOptions, compute_dtype
from .window import windowed_mean

CHUNK_BYTES = 2 << 20  # of one map of a chunk; there are about 15 of them at a time


def run_levels(levels: Sequence[LevelInputs], options: SSIMOptions) -> list[LevelResult]:
    """Losses and gradients of the levels; see ``autograd.RunLevels``."""
    return [_Level(v, options).run() if v.x.numel() else empty_result(v) for v in levels]


class _Level:
    """One level: the factors of its min-max scaling and the loop over chunks of planes."""

    def __init__(self, level: LevelInputs, options: SSIMOptions):
        self.x, self.y, self.mask, self.weights, need_grad = level
        self.options, self.dtype = options, compute_dtype(self.x)
        like = torch.empty(0, dtype=self.dtype, device=self.x.device)
        if options.scaling is not None:
            self.planes = plane_range(self.x, self.mask)
            ranges = (self.planes, plane_range(self.y, self.mask))
            self.factors = [half_low_and_scale(*scope_range(r, options.scaling)) for r in ranges]
            self.slope = 0.5 * self.factors[0][1]  # of the scaling of x
            self.sums = like.new_zeros(2, *self.x.shape[:2])  # of g and g x^, by plane
        self.grad = torch.empty_like(self.x, dtype=grad_dtype(self.x)) if need_grad else None

    def run(self) -> LevelResult:
        """Loss and gradient of the level."""
        losses = [self._chunk(at) for at in _chunks(self.x.shape)]
        if self.grad is not None and self.options.scaling in ("sample", "batch"):
            self._through_extrema((slice(None), slice(None)))
        return LevelResult(torch.stack(losses).sum(dtype=torch.float64).to(self.dtype), self.grad)

    def _chunk(self, at: tuple[slice, slice]) -> Tensor:
        """Loss of some samples and channels; writes their gradient."""
        x, y = self.x[at].to(self.dtype), self.y[at].to(self.dtype)
        if self.options.scaling is not None:
            x, y = (
                (0.5 * v - half_low[at][..., None, None]).mul_(scale[at][..., None, None])
                for v, (half_low, scale) in zip((x, y), self.factors, strict=True)
            )
        weight = 1.0 / self.x.numel() if self.weights is None else self.weights[at[0], None]
        loss, g = _loss_and_gradient(x, y, weight, self.options, self.grad is not None)
        if self.grad is None or g is None:
            return loss
        if self.options.scaling is None:
            self.grad[at] = g
            return loss
        self.sums[0][at], self.sums[1][at] = g.sum((2, 3)), x.mul_(g).sum((2, 3))
        self.grad[at] = g.mul_(self.slope[at][..., None, None])
        if self.options.scaling == "channel":  # now, while the chunk is in cache
            self._through_extrema(at)
        return loss

    def _through_extrema(self, at: tuple[slice, slice]) -> None:
        if self.options.scaling is None or not self.options.scaling_grad or self.grad is None:
            return
        mask, planes = None if self.mask is None else self.mask[at[0]], self.planes
        add_extrema_gradient(
            self.grad[at],
            self.x[at],
            mask,
            PlaneRange(*(v[at] for v in planes)),
            self.options.scaling,
            *(v[at] for v in (self.slope, *self.sums)),
        )


def _chunks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Whole samples if they fit into a chunk, else some channels of a sample."""
    n, c, h, w = shape
    planes = max(1, CHUNK_BYTES // (4 * h * w))
    samples, channels = max(1, planes // c), min(planes, c)
    for i in range(0, n, samples):
        for j in range(0, c, channels):
            yield slice(i, i + samples), slice(j, j + channels)


def _loss_and_gradient(
    x: Tensor, y: Tensor, weights: Tensor | float, options: SSIMOptions, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of ``weights`` (1 - S) / 2 over (N, C, H, W) maps, and its gradient for ``x``.

    Steps are in place if that is possible, and h1, h2 and s4 stand for A1 / 2, A2 / 2 and S / 4.
    """

    def mean(values: Tensor, adjoint: bool = False) -> Tensor:
        return windowed_mean(values, options.window_size, options.sigma, adjoint=adjoint)

    shift_x, shift_y = (v.mean((2, 3), keepdim=True) for v in (x, y))
    x, y = x - shift_x, y - shift_y
    a, b, q, r = mean(x), mean(y), mean((x * x).addcmul_(y, y)), mean(x * y)
    mean_x, mean_y = a + shift_x, b + shift_y
    h1 = (mean_x * mean_y).add_(0.5 * options.c1)
    b1 = (mean_x * mean_x).addcmul_(mean_y, mean_y).add_(options.c1)
    h2 = r.addcmul_(a, b, value=-1).add_(0.5 * options.c2)
    b2 = q.addcmul_(a, a, value=-1).addcmul_(b, b, value=-1).add_(options.c2)
    inverse = (b1 * b2).add_(options.eps).reciprocal_()
    s4 = (h1 * h2).mul_(inverse)
    loss = (0.5 - 2.0 * s4).mul_(weights).sum()
    if not need_grad:
        return loss, None
    d = inverse.mul_(weights).mul_(-2.0)  # the loss is -S / 2, that is, -2 s4
    g_r, s4 = h1.mul_(d), s4.mul_(d)
    minus_g_q = b1.mul_(s4)
    g_a = mean_y.mul_(h2).mul_(d).addcmul_(b, g_r, value=-1)
    g_a.addcmul_(mean_x, b2.mul_(s4), value=-2).addcmul_(a, minus_g_q, value=2)
    gradient = mean(g_a, adjoint=True).addcmul_(y, mean(g_r, adjoint=True))
    return loss, gradient.addcmul_(x, mean(minus_g_q, adjoint=True), value=-2)
