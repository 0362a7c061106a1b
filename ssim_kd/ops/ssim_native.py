"""The SSIM loss and its gradient by the C kernels in ``native``: the fast path on a CPU.

A level takes three steps: the ranges of all planes, from them the constants of each, and then loss
and gradient, plane by plane.
Shapes: N images, C channels, H x W cells; P = N C planes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int, c_size_t, c_ssize_t, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .cells import cell_weights, loss_of_sum
from .closed_form import LevelInputs, LevelResult, empty_result, grad_dtype
from .extrema_gradient import ExtremaGradient
from .native_build import BuildError, build
from .options import SSIMOptions
from .plane_affine import PlaneRange, minmax_affine, plane_constants, scope_range, unit_affine
from .window import band_weights, gaussian_window

SOURCES = sorted(Path(__file__).with_name("native").glob("*.c"))
MAX_WINDOW = 25  # the kernels keep 7 window_size rows of 8 or 16 planes in cache
# Planes that are not dense float32 are copied into that form a few at a time: as many as have this
# size, but for each thread as many as go through the kernels together.
STAGED_BYTES, STAGED_PLANES = 4 << 20, 16


@lru_cache(maxsize=16)
def _library(window_size: int) -> ctypes.CDLL | str:
    """The kernels for a window, or why they cannot be had."""
    try:
        library = build(SOURCES, K=window_size)
        _ = library.plane_ranges, library.ssim_planes
    except (BuildError, AttributeError) as error:
        return str(error)
    library.plane_ranges.argtypes = [c_int, c_int, c_size_t, *3 * [c_void_p], c_ssize_t]
    library.plane_ranges.restype = None
    library.ssim_planes.argtypes = [
        *4 * [c_int], *4 * [c_void_p], c_ssize_t, *3 * [c_void_p], c_float, *3 * [c_void_p],
    ]  # fmt: skip
    return library


def why_not_built(window_size: int) -> str | None:
    """Why there are no kernels for a window, or None if there are. The first call compiles them."""
    library = _library(window_size)
    return library if isinstance(library, str) else None


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x[0].is_contiguous() and not x.is_neg()


class _Level:
    """One level: its table of planes and the calls over it."""

    def __init__(self, level: LevelInputs, options: SSIMOptions):
        x, y, mask, need_grad = level
        self.x, self.y, self.mask, self.options = x, y, mask, options
        n, c, h, w = x.shape
        library = _library(options.window_size)
        assert not isinstance(library, str)
        self.library, self.threads = library, torch.get_num_threads()
        self.grad = torch.empty_like(x, dtype=grad_dtype(x)) if need_grad else None
        self.like = torch.empty(0, dtype=torch.float32)
        self.weights = cell_weights(x.shape, self.like, mask, options.crop(h, w))
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
            planes = PlaneRange(*ranges[:3])
            slope = 0.5 * self.gain * table[1]
            wider = ExtremaGradient(planes, scope_range(planes, scope), slope, scope, self.mask)
            wider.sum_g, wider.sum_gx = sums[1:].float()
            wider.finish(self.x, self.grad)
        value = loss_of_sum(4.0 * sums[0].sum(), self.x.shape, self.weights)
        return LevelResult(value.float(), self.grad)

    def _table(self, ranges: Tensor) -> Tensor:
        """The kernels' constants of every plane, (9, N, C), from the ranges of x and y."""
        in_x, in_y = PlaneRange(*ranges[:3]), PlaneRange(*ranges[4:7])
        scope = self.options.scaling
        if scope is None:
            affine_x, constants = unit_affine(torch.maximum(in_x.peak, in_y.peak), self.options)
            affine_y = affine_x
        else:
            affine_x = minmax_affine(scope_range(in_x, scope))
            affine_y = minmax_affine(scope_range(in_y, scope))
            constants = plane_constants(torch.ones_like(in_x.peak), self.options)
        rows = []
        for mean, affine in ((ranges[3], affine_x), (ranges[7], affine_y)):
            half_mean = 0.5 * mean
            rows += [half_mean, affine.scale, (half_mean - affine.half_low) * affine.scale]
        return torch.stack([*rows, *constants])

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        """Sample and channels of what is taken at a time."""
        n, c, _, _ = self.x.shape
        for i in range(n):
            for c0 in range(0, c, self.step):
                yield i, slice(c0, min(c0 + self.step, c))

    @staticmethod
    def _dense(planes: Tensor) -> Tensor:
        return planes.float().resolve_neg().contiguous()

    def _ranges(self, out: Tensor, planes: Tensor, sample: int) -> None:
        """Ranges of (n, H, W) planes into the first four rows of ``out``, from its start."""
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
            self.window.data_ptr(), self.row_in.data_ptr(), weights.data_ptr(), self.gain,
            sums[here].data_ptr(), None if extrema is None else extrema[here].data_ptr(),
            self.padding[sample].data_ptr(),
        )  # fmt: skip
        if not enough:
            raise MemoryError(f"no memory for some rows of a map of {h} x {w} cells")
        if target is not None and grad is not None and grad is not target:
            target.copy_(grad)


def run_levels(levels: Sequence[LevelInputs], options: SSIMOptions) -> list[LevelResult]:
    """Losses and gradients of the levels; see ``closed_form.RunLevels``."""
    return [_run_level(v, options) if v.x.numel() else empty_result(v) for v in levels]


def _run_level(level: LevelInputs, options: SSIMOptions) -> LevelResult:
    shape = level.x.shape
    if level.x.data_ptr() == 0 or level.y.data_ptr() == 0:
        raise RuntimeError("impl='native' reads memory, and these maps have none (FakeTensor?)")
    apart = level.mask is not None or options.scaling in ("sample", "batch")
    if not apart and level.x.is_contiguous() and level.y.is_contiguous():
        # Where a plane's sample makes no difference, one call takes all planes.
        x, y = (m.view(1, -1, *shape[2:]) for m in (level.x, level.y))
        level = level._replace(x=x, y=y)
    value, grad = _Level(level, options).run()
    return LevelResult(value, None if grad is None else grad.view(shape))
