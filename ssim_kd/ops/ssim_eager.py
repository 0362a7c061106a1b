"""The SSIM loss and its gradient by plain torch calls: the fast path on a CPU, and for any device.

A few planes at a time go through all steps while they lie in cache; nothing of the size of a map is
made but the gradient. ``ssim_pointwise`` has the algebra, ``band_gemm`` the windowed means.
Shapes: N images, C channels, H x W cells; n planes in a chunk, n <= C if samples must not mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .band_gemm import BandFilter
from .cells import cell_weights, compute_dtype
from .closed_form import LevelResult, grad_dtype
from .extrema_gradient import ExtremaGradient
from .options import SSIMOptions
from .plane_affine import (
    PlaneAffine,
    PlaneConstants,
    is_tame,
    minmax_affine,
    plane_range,
    scope_range,
    unit_affine,
)
from .ssim_pointwise import Rows, moment_gradients_in_place, ssim_in_place

CHUNK_BYTES = 6 << 20  # of all temporaries of a chunk together: they stay in the last-level cache
MAPS_PER_CHUNK = 11  # 6 in ``_Buffers.maps``, 4 in ``work``, 1 in ``inverse``


class _Chunk(NamedTuple):
    """Planes ``planes`` (a slice of the N C planes) of the maps, (n, H, W) views each."""

    planes: slice
    x: Tensor
    y: Tensor
    grad: Tensor | None
    weights: Tensor | None  # (H, 1, W) weight of each cell, the same for all planes of the chunk


class _Scratch:
    """Temporaries for chunks of n planes, with the filters between them.

    ``maps`` (6, H, n W): x', y', then in forward the four filtered moments; x' and y' stay where
    they are, since the gradient needs them. ``work`` (4, H, n W), ``inverse`` (H, n W).
    """

    def __init__(self, n: int, height: int, width: int, like: Tensor, options: SSIMOptions):
        maps, work = like.new_empty(6, height, n, width), like.new_empty(4, height, n, width)
        window = (options.window_size, options.sigma)
        self.filter = (
            BandFilter(maps[:4], work, "rows", *window),
            BandFilter(work, maps[2:], "columns", *window),
        )
        self.filter_adjoint = (
            BandFilter(work[:3], maps[2:5], "columns", *window, adjoint=True),
            BandFilter(maps[2:5], work[:3], "rows", *window, adjoint=True),
        )
        flat = (height, n * width)
        self.maps, self.work = maps.view(6, *flat), work.view(4, *flat)
        self.inverse = like.new_empty(flat)


class _Level:
    """One level: what is constant over its chunks, and the loop over them."""

    def __init__(
        self, x: Tensor, y: Tensor, mask: Tensor | None, options: SSIMOptions, need_grad: bool
    ):
        self.x, self.y, self.options = x, y, options
        self.like = torch.empty(0, dtype=compute_dtype(x), device=x.device)
        crop = options.crop(*x.shape[2:])
        self.weights = cell_weights(x.shape, self.like, mask, crop)
        self.grad = torch.empty_like(x, dtype=grad_dtype(x)) if need_grad else None
        constants = (options.c1, options.c2, options.eps)
        self.plain_constants = tuple(self.like.new_tensor(value) for value in constants)
        self.affine_x: PlaneAffine | None = None
        self.affine_y: PlaneAffine | None = None
        self.constants: PlaneConstants | None = None
        self.extrema: ExtremaGradient | None = None
        if options.scaling is not None:
            planes = plane_range(x, mask)
            scoped = scope_range(planes, options.scaling)
            self.affine_x = minmax_affine(scoped)
            self.affine_y = minmax_affine(scope_range(plane_range(y, mask), options.scaling))
            if need_grad and options.scaling_grad:
                slope = 0.5 * self.affine_x.scale
                self.extrema = ExtremaGradient(planes, scoped, slope, options.scaling, mask)
        elif x.device.type != "cpu" or not (is_tame(x) and is_tame(y)):
            self.affine_x, self.constants = unit_affine(x, y, options)
            self.affine_y = self.affine_x

    def run(self) -> LevelResult:
        """Loss and gradient of the level."""
        n, c, h, w = self.x.shape
        per_chunk = CHUNK_BYTES // (h * w * self.like.element_size() * MAPS_PER_CHUNK)
        most = max(1, min(n * c, per_chunk))
        sums, scratch = [], None
        for chunk in self._chunks(most):
            planes = chunk.x.shape[0]
            if scratch is None or scratch.inverse.shape[1] != planes * w:
                scratch = _Scratch(planes, h, w, self.like, self.options)
            sums.append(self._run_chunk(chunk, scratch))
        ssim = 4.0 * torch.stack(sums).double().sum()
        if self.weights is None:
            value = 0.5 - 0.5 * ssim / self.x.numel()
        else:
            value = 0.5 * (c * self.weights.double().sum() - ssim)
        if self.extrema is not None and self.grad is not None:
            self.extrema.finish(self.x, self.grad)
        return LevelResult(value.to(self.like.dtype), self.grad)

    def _chunks(self, most: int) -> Iterator[_Chunk]:
        """Views of at most ``most`` planes. Samples mix only where the memory layout lets them."""
        n, c, h, w = self.x.shape
        maps = [self.x, self.y] + ([] if self.grad is None else [self.grad])
        if self.weights is None and all(m.is_contiguous() for m in maps):
            groups = [[m.view(1, n * c, h, w)[0] for m in maps]]
        else:
            groups = [[m[i] for m in maps] for i in range(n)]
        for i, group in enumerate(groups):
            count = group[0].shape[0]
            weights = None if self.weights is None else self.weights[i, :, None, :]
            step = -(-count // -(-count // most))  # chunks of about equal size
            for start in range(0, count, step):
                views = [m[start : start + step] for m in group]
                planes = slice(i * c + start, i * c + start + views[0].shape[0])
                grad = views[2] if self.grad is not None else None
                yield _Chunk(planes, views[0], views[1], grad, weights)

    def _load(self, source: Tensor, out: Tensor, affine: PlaneAffine | None, at: slice) -> None:
        """Copy (n, H, W) planes into ``out`` (H, n W), scaled."""
        n, h, w = source.shape
        out.view(h, n, w).copy_(source.transpose(0, 1))
        if affine is not None:
            half_low, scale = (v.reshape(-1)[at].repeat_interleave(w) for v in affine)
            torch.sub(out.mul_(0.5), half_low, out=out).mul_(scale)

    def _run_chunk(self, chunk: _Chunk, scratch: _Scratch) -> Tensor:
        """Weighted sum of S / 4 over the chunk; writes the chunk's gradient."""
        n, h, w = chunk.x.shape
        maps, work, inverse = scratch.maps, scratch.work, scratch.inverse
        x, y, moments = maps[0], maps[1], maps[2:]
        self._load(chunk.x, x, self.affine_x, chunk.planes)
        self._load(chunk.y, y, self.affine_y, chunk.planes)
        rows = self._rows(x.view(h, n, w), y.view(h, n, w), chunk.planes)
        x.sub_(rows.shift_x)
        y.sub_(rows.shift_y)
        torch.addcmul(rows.c2, x, x, out=moments[0]).addcmul_(y, y)
        torch.addcmul(0.5 * rows.c2, x, y, out=moments[1])
        for windowed_mean in scratch.filter:
            windowed_mean()
        quarter = ssim_in_place(moments, work, inverse, rows)
        if chunk.weights is None:
            total = quarter.sum()
            weight: Tensor | float = -0.5 / self.x.numel()
        else:
            weight = chunk.weights.expand(h, n, w).reshape(h, n * w)
            total = torch.mul(quarter, weight, out=work[3]).sum()
            weight = -0.5 * weight
        if chunk.grad is not None:
            moment_gradients_in_place(moments, work, inverse, rows, weight)
            for adjoint in scratch.filter_adjoint:
                adjoint()
            self._finish_gradient(chunk, maps, work, rows)
        return total

    def _rows(self, x: Tensor, y: Tensor, at: slice) -> Rows:
        """Constants of the planes of (H, n, W) maps, spread along the rows."""
        w = x.shape[2]
        # Near the mean is enough for a shift: a quarter of the rows will do.
        shifts = (m[::4].mean((0, 2)).repeat_interleave(w) for m in (x, y))
        if self.constants is None:
            return Rows(*shifts, *self.plain_constants)
        return Rows(*shifts, *(v.reshape(-1)[at].repeat_interleave(w) for v in self.constants))

    def _finish_gradient(self, chunk: _Chunk, maps: Tensor, work: Tensor, rows: Rows) -> None:
        """Combine the moments' gradients, after their adjoint filters, into the map's gradient."""
        assert chunk.grad is not None
        n, h, w = chunk.x.shape
        x, y = maps[0], maps[1]
        g_r, minus_g_q, grad = work[0], work[1], work[2]
        grad.addcmul_(x, minus_g_q, value=-2).addcmul_(y, g_r)
        if self.extrema is not None:
            self.extrema.add_sums(chunk.planes, grad, x, rows.shift_x[::w])
        if self.affine_x is not None:
            slope = 0.5 * self.affine_x.scale.reshape(-1)[chunk.planes]
            grad.mul_(slope.repeat_interleave(w))
        chunk.grad.copy_(grad.view(h, n, w).transpose(0, 1))
        if self.extrema is not None:
            self.extrema.finish_chunk(chunk.planes, chunk.x, chunk.grad)


def run_levels(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    options: SSIMOptions,
    need_grad: Sequence[bool],
) -> list[LevelResult]:
    """Losses and gradients of L levels, (N, C, H, W) each; see ``closed_form.RunLevels``."""
    results = []
    for x, y, mask, need in zip(inputs, targets, masks, need_grad, strict=True):
        if x.numel() == 0:
            grad = torch.zeros_like(x, dtype=grad_dtype(x)) if need else None
            results.append(LevelResult(x.new_zeros((), dtype=compute_dtype(x)), grad))
        else:
            results.append(_Level(x.detach(), y, mask, options, need).run())
    return results
