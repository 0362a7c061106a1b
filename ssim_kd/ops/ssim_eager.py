"""The SSIM loss and its gradient by plain torch calls: the fast path for any device.

A few planes at a time go through all steps while they lie in cache; nothing of the size of a map is
made but the gradient. ``ssim_pointwise`` has the algebra, ``window_filters`` the windowed means.
Shapes: N images, C channels, H x W cells; n planes in a chunk, n <= C if samples must not mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import cell_weights, compute_dtype, loss_of_sum
from .closed_form import LevelInputs, LevelResult, empty_result, grad_dtype
from .extrema_gradient import ExtremaGradient
from .options import SSIMOptions
from .plane_affine import (
    PlaneAffine,
    PlaneConstants,
    minmax_affine,
    plane_range,
    scope_range,
    unit_affine,
)
from .ssim_pointwise import Maps, Rows, moment_gradients_in_place, ssim_in_place
from .ssim_reference import HUGE
from .window_filters import ColumnFilter, RowFilter, Window

CHUNK_BYTES = 8 << 20  # of all temporaries of a chunk together: they stay in the last-level cache
MAPS_PER_CHUNK = 13  # 4 in ``maps``, ``work`` and ``moments``, 1 ``inverse``


class _Chunk(NamedTuple):
    """Planes ``planes`` (a slice of the N C planes) of the maps, (n, H, W) views each."""

    planes: slice
    x: Tensor
    y: Tensor
    grad: Tensor | None
    weights: Tensor | None  # (H, 1, W) weight of each cell, the same for all planes of the chunk


class _Scratch:
    """Temporaries for chunks of n planes, with the filters between them.

    ``maps`` (4, H, n W): x', y', which stay since the gradient needs them, and the two products;
    ``moments`` (4, H, n W): the four filtered maps. Between the filters lies ``work``.
    """

    def __init__(self, n: int, height: int, width: int, like: Tensor, options: SSIMOptions):
        window = Window(options.window_size, options.sigma)
        self.maps, work, moments = like.new_empty(3, 4, height, n * width)
        self._filter = (
            ColumnFilter(self.maps, work, window),
            RowFilter(work, moments, width, window),
        )
        self._adjoint = (
            RowFilter(work[:3], moments[:3], width, window, adjoint=True),
            ColumnFilter(moments[:3], work[:3], window, adjoint=True),
        )
        inverse = like.new_empty(height, n * width)
        # Once filtered, the products have served: the means take their place.
        self._pointwise = Maps(moments, work, self.maps[2], self.maps[3], inverse)

    def filter(self) -> Maps:
        """The moments of ``maps``."""
        for windowed_mean in self._filter:
            windowed_mean()
        return self._pointwise

    def adjoint(self) -> Tensor:
        """The adjoint of ``filter`` for the three maps that lie in ``work``; in their place."""
        for windowed_mean in self._adjoint:
            windowed_mean()
        return self._pointwise.work[:3]


class _Level:
    """One level: what is constant over its chunks, and the loop over them."""

    def __init__(self, level: LevelInputs, options: SSIMOptions):
        x, y, mask, need_grad = level
        self.x, self.y, self.options = x, y, options
        self.like = torch.empty(0, dtype=compute_dtype(x), device=x.device)
        crop = options.crop(*x.shape[2:])
        self.weights = cell_weights(x.shape, self.like, mask, crop)
        # The gradient leaves the chunk's steps as that of sum(S / 4), or weighted by ``weights``.
        self.gain = -2.0 / (1 if self.weights is not None else x.numel())
        self.grad = torch.empty_like(x, dtype=grad_dtype(x)) if need_grad else None
        constants = (options.c1, options.c2, options.eps)
        self.plain_constants = tuple(self.like.new_tensor(value) for value in constants)
        self.affine_x: PlaneAffine | None = None
        self.affine_y: PlaneAffine | None = None
        self.constants: PlaneConstants | None = None
        self.extrema: ExtremaGradient | None = None
        # Maps with huge values need other units. On a CPU they are looked for on the way: the
        # largest square and the shifts of every chunk. Other devices are not to be waited for.
        self.watch = options.scaling is None and x.device.type == "cpu"
        self.watched: list[Tensor] = []
        if options.scaling is not None:
            planes = plane_range(x, mask)
            scoped = scope_range(planes, options.scaling)
            self.affine_x = minmax_affine(scoped)
            self.affine_y = minmax_affine(scope_range(plane_range(y, mask), options.scaling))
            if need_grad and options.scaling_grad:
                slope = 0.5 * self.gain * self.affine_x.scale
                self.extrema = ExtremaGradient(planes, scoped, slope, options.scaling, mask)
        elif not self.watch:
            self._change_units()

    def _change_units(self) -> None:
        self.affine_x, self.constants = unit_affine(
            torch.maximum(plane_range(self.x).peak, plane_range(self.y).peak), self.options
        )
        self.affine_y = self.affine_x

    def run(self) -> LevelResult:
        """Loss and gradient of the level."""
        quarter = self._run_chunks()
        if self.watch and not torch.cat(self.watched).amax() <= 0.25 * HUGE**2:  # nor NaN
            self.watch = False
            self._change_units()
            quarter = self._run_chunks()
        if self.extrema is not None and self.grad is not None:
            self.extrema.finish(self.x, self.grad)
        value = loss_of_sum(4.0 * quarter, self.x.shape, self.weights)
        return LevelResult(value.to(self.like.dtype), self.grad)

    def _run_chunks(self) -> Tensor:
        """Weighted sum of S / 4, in float64."""
        n, c, h, w = self.x.shape
        per_chunk = CHUNK_BYTES // (h * w * self.like.element_size() * MAPS_PER_CHUNK)
        most = max(1, min(n * c, per_chunk))
        sums, scratch = [], None
        for chunk in self._chunks(most):
            planes = chunk.x.shape[0]
            if scratch is None or scratch.maps.shape[2] != planes * w:
                scratch = _Scratch(planes, h, w, self.like, self.options)
            sums.append(self._run_chunk(chunk, scratch))
        return torch.stack(sums).double().sum()

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

    def _load(self, source: Tensor, out: Tensor, affine: PlaneAffine | None, at: slice) -> Tensor:
        """Copy (n, H, W) planes into ``out`` (H, n W), scaled, less a shift near their mean.

        Returns:
            the shifts of the scaled planes, spread along the row (n W,).
        """
        n, h, w = source.shape
        planes = out.view(h, n, w)
        if self.watch:
            mean = source.mean((1, 2), dtype=out.dtype)
        else:  # in double, since values may be huge; once scaled, near the mean is enough
            mean = source[:, :: max(1, h // 16)].mean((1, 2), dtype=torch.float64).to(out.dtype)
        if affine is None:
            torch.sub(source.transpose(0, 1), mean[:, None], out=planes)
            return mean.repeat_interleave(w)
        planes.copy_(source.transpose(0, 1))
        half_low, scale = (v.reshape(-1)[at] for v in affine)
        half_mean = 0.5 * mean
        torch.add(-half_mean.repeat_interleave(w), out, alpha=0.5, out=out)
        out.mul_(scale.repeat_interleave(w))
        return ((half_mean - half_low) * scale).repeat_interleave(w)

    def _run_chunk(self, chunk: _Chunk, scratch: _Scratch) -> Tensor:
        """Weighted sum of S / 4 over the chunk; writes the chunk's gradient."""
        n, h, w = chunk.x.shape
        x, y, squares, product = scratch.maps
        rows = self._rows(
            self._load(chunk.x, x, self.affine_x, chunk.planes),
            self._load(chunk.y, y, self.affine_y, chunk.planes),
            chunk.planes,
            w,
        )
        torch.addcmul(rows.c2, x, x, out=squares).addcmul_(y, y)
        if self.watch:
            shifts = torch.stack([rows.shift_x[::w], rows.shift_y[::w]]).square_()
            self.watched += [squares.amax()[None], shifts.flatten()]
        torch.addcmul(0.5 * rows.c2, x, y, out=product)
        maps = scratch.filter()
        quarter = ssim_in_place(maps, rows)
        if chunk.weights is None:
            total, weights = quarter.sum(), None
        else:
            weights = chunk.weights.expand(h, n, w).reshape(h, n * w)
            total = torch.mul(quarter, weights, out=maps.work[3]).sum()
        if chunk.grad is not None:
            moment_gradients_in_place(maps, weights)
            self._finish_gradient(chunk, scratch.adjoint(), x, y, rows.shift_x[::w])
        return total

    def _rows(self, shift_x: Tensor, shift_y: Tensor, at: slice, width: int) -> Rows:
        """The constants of planes ``at``, spread along the row as the shifts are."""
        if self.constants is None:
            return Rows(shift_x, shift_y, *self.plain_constants)
        constants = (v.reshape(-1)[at].repeat_interleave(width) for v in self.constants)
        return Rows(shift_x, shift_y, *constants)

    def _finish_gradient(
        self, chunk: _Chunk, gradients: Tensor, x: Tensor, y: Tensor, shift_x: Tensor
    ) -> None:
        """Combine the moments' gradients, after their adjoint filters, into the map's gradient."""
        assert chunk.grad is not None
        n, h, w = chunk.x.shape
        g_r, minus_g_q, grad = gradients
        grad.addcmul_(x, minus_g_q, value=-2).addcmul_(y, g_r)
        if self.extrema is not None:
            self.extrema.add_sums(chunk.planes, grad, x, shift_x)
        slope: Tensor | float = self.gain
        if self.affine_x is not None:
            slope = 0.5 * self.gain * self.affine_x.scale.reshape(-1)[chunk.planes, None, None]
        torch.mul(grad.view(h, n, w).transpose(0, 1), slope, out=chunk.grad)
        if self.extrema is not None:
            self.extrema.finish_chunk(chunk.planes, chunk.x, chunk.grad)


def run_levels(levels: Sequence[LevelInputs], options: SSIMOptions) -> list[LevelResult]:
    """Losses and gradients of the levels; see ``closed_form.RunLevels``."""
    return [_Level(v, options).run() if v.x.numel() else empty_result(v) for v in levels]
