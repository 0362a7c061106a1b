"""The SSIM loss and its gradient by the C kernels, on a CPU.

A level takes three steps: the ranges of all planes, the constants of each plane from its range, and
loss and gradient plane by plane.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int, c_size_t, c_ssize_t, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ssim_kd.ops.autograd import LevelInputs, LevelResult, empty_result, grad_dtype
from ssim_kd.ops.min_max import PlaneRange, add_extrema_gradient, half_low_and_scale, scope_range
from ssim_kd.ops.options import SSIMOptions
from ssim_kd.ops.window import band_weights, gaussian_window

from .build import BuildError, build

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
MAX_WINDOW = 25  # the kernels keep 7 window_size rows of 8 or 16 planes in cache
# Planes that are not dense float32 are copied, this many bytes at a time, or one vector of planes
# for each thread.
STAGED_BYTES, STAGED_PLANES = 4 << 20, 16


@lru_cache(maxsize=16)
def _library(window_size: int) -> ctypes.CDLL | str:
    """The kernels for a window, or why they are not available."""
    try:
        library = build(SOURCES, K=window_size)
        _ = library.plane_ranges, library.ssim_planes
    except (BuildError, AttributeError) as error:
        return str(error)
    library.plane_ranges.argtypes = [c_int, c_int, c_size_t, *3 * [c_void_p], c_ssize_t]
    library.plane_ranges.restype = None
    library.ssim_planes.argtypes = [
        *4 * [c_int], *4 * [c_void_p], c_ssize_t, *3 * [c_float], *3 * [c_void_p], c_float,
        *3 * [c_void_p],
    ]  # fmt: skip
    return library


def why_not_built(window_size: int) -> str | None:
    """Why no kernels exist for a window, or None. The first call compiles them."""
    library = _library(window_size)
    return library if isinstance(library, str) else None


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x[0].is_contiguous() and not x.is_neg()


class _Level:
    """One level: its buffers and the calls of the kernels."""

    def __init__(self, level: LevelInputs, options: SSIMOptions):
        x, y, mask, self.weights, need_grad = level
        self.x, self.y, self.mask, self.options = x, y, mask, options
        n, c, h, w = x.shape
        library = _library(options.window_size)
        assert not isinstance(library, str)
        self.library, self.threads = library, torch.get_num_threads()
        self.grad = torch.empty_like(x, dtype=grad_dtype(x)) if need_grad else None
        self.like = torch.empty(0, dtype=torch.float32)
        self.gain = -2.0 / (1 if self.weights is not None else x.numel())
        self.padding = self.like.new_zeros(1, h, w).expand(n, h, w)
        if mask is not None:
            self.padding = self.like.new_zeros(n, h, w).masked_fill_(~mask, float("inf"))
        plain = all(_is_plain(m) for m in (x, y, self.grad) if m is not None)
        fits = max(STAGED_BYTES // (4 * h * w), STAGED_PLANES * self.threads)
        self.step = c if plain else -(-fits // STAGED_PLANES) * STAGED_PLANES
        size, sigma = options.window_size, options.sigma
        self.window = gaussian_window(size, sigma).float()
        self.row_in = band_weights(h, size, sigma)[1]
        self.ones = self.like.new_ones(h, w)

    def run(self) -> LevelResult:
        """Loss and gradient of the level."""
        n, c = self.x.shape[:2]
        ranges = self.like.new_empty(8, n, c)
        for i, at in self._chunks():
            for first, source in ((0, self.x), (4, self.y)):
                self._ranges(ranges[first:, i, at.start :], self._dense(source[i, at]), i)
        table = self._table(ranges)
        scope = self.options.scaling if self.options.scaling_grad else None
        extrema = ranges[:2] if scope == "channel" else None  # their gradient is made on the way
        sums = self.like.new_empty(3, n, c, dtype=torch.float64)
        for i, at in self._chunks():
            self._ssim(i, at, table, extrema, sums)
        if scope in ("sample", "batch") and self.grad is not None:
            slope = 0.5 * self.gain * table[1]
            planes = PlaneRange(*ranges[:3])
            add_extrema_gradient(
                self.grad, self.x, self.mask, planes, scope, slope, *sums[1:].float()
            )
        total = 4.0 * sums[0].sum()  # of the weighted S
        if self.weights is None:
            return LevelResult((0.5 - 0.5 * total / self.x.numel()).float(), self.grad)
        value = 0.5 * (c * self.weights.double().sum() - total)
        return LevelResult(value.float(), self.grad)

    def _table(self, ranges: Tensor) -> Tensor:
        """The kernels' constants of every plane, (6, N, C), from the ranges of x and y."""
        rows = []
        for low, high, peak, mean in (ranges[:4], ranges[4:]):
            half_low, scale = torch.zeros_like(low), torch.full_like(low, 2.0)
            if self.options.scaling is not None:
                planes = scope_range(PlaneRange(low, high, peak), self.options.scaling)
                half_low, scale = half_low_and_scale(*planes)
            rows += [0.5 * mean, scale, (0.5 * mean - half_low) * scale]
        return torch.stack(rows)

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        """Sample and channels of each chunk."""
        n, c, _, _ = self.x.shape
        for i in range(n):
            for c0 in range(0, c, self.step):
                yield i, slice(c0, min(c0 + self.step, c))

    @staticmethod
    def _dense(planes: Tensor) -> Tensor:
        return planes.float().resolve_neg().contiguous()

    def _ranges(self, out: Tensor, planes: Tensor, sample: int) -> None:
        """Write the ranges of (n, H, W) planes into the first four rows of ``out``."""
        self.library.plane_ranges(
            self.threads, len(planes), planes[0].numel(), planes.data_ptr(),
            self.padding[sample].data_ptr(), out.data_ptr(), out.stride(0),
        )  # fmt: skip

    def _ssim(
        self, sample: int, at: slice, table: Tensor, extrema: Tensor | None, sums: Tensor
    ) -> None:
        """Loss and gradient of channels ``at`` of a sample."""
        _, _, h, w = self.x.shape
        x, y = self._dense(self.x[sample, at]), self._dense(self.y[sample, at])
        target = grad = None
        if self.grad is not None:
            target = self.grad[sample, at]
            grad = target if _is_plain(self.grad) else torch.empty_like(x)
        weights = self.ones if self.weights is None else self.weights[sample]
        here = (slice(None), sample, at)
        enough = self.library.ssim_planes(
            self.threads, len(x), h, w, x.data_ptr(), y.data_ptr(),
            None if grad is None else grad.data_ptr(), table[here].data_ptr(), table.stride(0),
            self.options.c1, self.options.c2, self.options.eps,
            self.window.data_ptr(), self.row_in.data_ptr(), weights.data_ptr(), self.gain,
            sums[here].data_ptr(), None if extrema is None else extrema[here].data_ptr(),
            self.padding[sample].data_ptr(),
        )  # fmt: skip
        if not enough:
            raise MemoryError(f"no memory for the rows of maps of {h} x {w} cells")
        if target is not None and grad is not None and grad is not target:
            target.copy_(grad)


def run_levels(levels: Sequence[LevelInputs], options: SSIMOptions) -> list[LevelResult]:
    """Losses and gradients of the levels; see ``autograd.RunLevels``."""
    return [_run_level(v, options) if v.x.numel() else empty_result(v) for v in levels]


def _run_level(level: LevelInputs, options: SSIMOptions) -> LevelResult:
    shape = level.x.shape
    if level.x.data_ptr() == 0 or level.y.data_ptr() == 0:
        raise RuntimeError("impl='native' needs maps with memory; got maps without (FakeTensor?)")
    by_sample = level.weights is not None or options.scaling in ("sample", "batch")
    if not by_sample and level.x.is_contiguous() and level.y.is_contiguous():
        # One call for all planes.
        x, y = (m.view(1, -1, *shape[2:]) for m in (level.x, level.y))
        level = level._replace(x=x, y=y)
    value, grad = _Level(level, options).run()
    return LevelResult(value, None if grad is None else grad.view(shape))
