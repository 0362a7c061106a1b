"""The SSIM loss and its gradient by Triton kernels, for CUDA and ROCm.

A level takes one launch for the ranges and means of its planes, two for each group of channels (one
for loss and vertical filters, one for the gradient), and one more with scaling="channel".
Shapes: N images, C channels, H x W cells, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ssim_kd.ops.autograd import LevelInputs, LevelResult, empty_result, grad_dtype
from ssim_kd.ops.min_max import (
    MIN_RANGE,
    PlaneRange,
    add_extrema_gradient,
    half_low_and_scale,
    relative_floor,
    scope_range,
)
from ssim_kd.ops.options import SSIMOptions
from ssim_kd.ops.window import band_weights

from .plane_kernels import extrema_kernel, range_kernel
from .ssim_kernels import gradient_kernel, moments_kernel

LANES = 128  # columns of a program, one for each thread
TILE = 1024  # cells of a plane that a program reads at a time
# Scratch is three maps of a group of channels: one group if that is small, else three groups, which
# make scratch as large as one map.
SMALL_SCRATCH = 16 << 20
MAX_WINDOW = 15  # filters live in registers: 7 window_size numbers for each lane


class _Level:
    """One level: its table of planes and its launches."""

    def __init__(self, level: LevelInputs, options: SSIMOptions):
        x, y, mask, self.weights, need_grad = level
        n, c, h, w = x.shape
        self.x, self.y, self.options = x, y, options
        self.grad = torch.empty_like(x, dtype=grad_dtype(x)) if need_grad else None
        dense = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        self.channels_last = not dense
        self.like = torch.empty(0, dtype=torch.float32, device=x.device)
        self.mask, self.valid = mask, x if mask is None else mask.contiguous().view(torch.uint8)
        self.tile: dict[str, Any] = {"CB": 32 if self.channels_last else 1}
        self.tile.update(BLOCK=TILE // self.tile["CB"], MASKED=mask is not None)
        self.tile_grid = (n * triton.cdiv(c, self.tile["CB"]),)
        per_channel = n * w
        fits = max(1, SMALL_SCRATCH // (12 * per_channel * h), -(-c // 3))
        groups = -(-c // min(c, fits)) if need_grad else 1
        self.channels = -(-c // groups)  # in a launch
        self.programs = sum(
            triton.cdiv(per_channel * min(self.channels, c - c0), LANES)
            for c0 in range(0, c, self.channels)
        )
        self._fill_planes()

    def _fill_planes(self) -> None:
        n, c, h, w = self.x.shape
        options = self.options
        self.planes, self.ranges = self.like.new_empty(6, n, c), self.like.new_empty(8, n, c)
        range_kernel[self.tile_grid](
            self.x, self.y, self.valid, self.planes, self.ranges,
            c, h, w, n * c, MIN_RANGE, relative_floor(torch.float32),
            *self.x.stride(), *self.y.stride(), SCALED=options.scaling is not None, **self.tile,
        )  # fmt: skip
        if options.scaling in ("sample", "batch"):  # join the planes of a scope
            for i in (0, 1):
                found = self.ranges[4 * i : 4 * i + 4]
                scoped = scope_range(PlaneRange(*found[:3]), options.scaling)
                half_low, scale = half_low_and_scale(*scoped)
                self.planes[3 * i], self.planes[3 * i + 1] = half_low, scale
                self.planes[3 * i + 2] = (0.5 * found[3] - half_low) * scale

    def run(self, partial: Tensor) -> Tensor | None:
        """Write ``programs`` parts of the loss into ``partial``; return the gradient."""
        n, c, h, w = self.x.shape
        options, window = self.options, (self.options.window_size, self.options.sigma)
        row_out, row_in = band_weights(h, *window, self.x.device)
        column_out, column_in = band_weights(w, *window, self.x.device)
        through = self.grad is not None and options.scaling is not None and options.scaling_grad
        sums = self.like.new_empty(2, n, c, w) if through else self.planes
        weights = self.planes if self.weights is None else self.weights
        build = {"K": options.window_size, "BLOCK": LANES, "CHANNELS_LAST": self.channels_last}
        scratch = self.planes
        if self.grad is not None:
            scratch = self.like.new_empty(3 * h * n * self.channels * w)
        done = 0
        for c0 in range(0, c, self.channels):
            here = min(self.channels, c - c0)
            lanes = n * here * w
            programs = triton.cdiv(lanes, LANES)
            sizes = (c, h, w, here, c0, lanes, n * c)
            moments_kernel[(programs,)](
                self.x, self.y, weights, self.planes, row_in, row_out, column_out, scratch,
                partial[done:], *sizes, 1.0 / self.x.numel(), options.c1, options.c2, options.eps,
                *self.x.stride(), *self.y.stride(),
                GRAD=self.grad is not None, WEIGHTED=self.weights is not None, num_warps=4, **build,
            )  # fmt: skip
            done += programs
            if self.grad is not None:
                gradient_kernel[(programs,)](
                    self.x, self.y, self.planes, column_in, scratch, self.grad, sums, *sizes,
                    *self.x.stride(), *self.y.stride(), *self.grad.stride(),
                    SUMS=through, num_warps=4, **build,
                )  # fmt: skip
        if through:
            self._through_extrema(sums)
        return self.grad

    def _through_extrema(self, sums: Tensor) -> None:
        assert self.grad is not None and self.options.scaling is not None
        n, c, h, w = self.x.shape
        if self.options.scaling == "channel":
            extrema_kernel[self.tile_grid](
                self.x, self.valid, self.planes, self.ranges, sums, self.grad,
                c, h, w, n * c, *self.x.stride(), *self.grad.stride(), **self.tile,
            )  # fmt: skip
            return
        planes = PlaneRange(*self.ranges[:3])
        scope, slope = self.options.scaling, 0.5 * self.planes[1]
        add_extrema_gradient(self.grad, self.x, self.mask, planes, scope, slope, *sums.sum(-1))


def run_levels(levels: Sequence[LevelInputs], options: SSIMOptions) -> list[LevelResult]:
    """Losses and gradients of the levels; see ``autograd.RunLevels``."""
    device = levels[0].x.device
    # Triton launches on the current device, which need not be that of the maps.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        runs = [_Level(v, options) if v.x.numel() else None for v in levels]
        programs = [0 if run is None else run.programs for run in runs]
        # One table for all levels needs one sum for the whole pyramid.
        partial = torch.zeros(len(runs), max([1, *programs]), dtype=torch.float32, device=device)
        grads = [
            empty_result(level).grad if run is None else run.run(row)
            for level, run, row in zip(levels, runs, partial, strict=True)
        ]
    values = partial.sum(1, dtype=torch.float64).float()
    return [LevelResult(value, grad) for value, grad in zip(values, grads, strict=True)]
