"""Triton kernels over whole planes: their ranges, and the gradient through their extrema.

A program processes CB channels of one sample: 1, or several in channels-last maps, if they are
neighbours in memory.
"""

# Triton types its arguments at each launch and has no use for annotations.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_place(C, CB: tl.constexpr):
    """Sample, and channels (CB, 1) with their mask, of this program."""
    groups = tl.cdiv(C, CB)
    channel = (tl.program_id(0) % groups) * CB + tl.arange(0, CB)[:, None]
    return tl.program_id(0) // groups, channel, channel < C


@triton.jit
def range_of(
    x, valid_cells, n, channel, alive, H, W, x_n, x_c, x_h, x_w,
    CB: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Smallest and largest valid value, largest magnitude and mean of CB planes, (CB,) each."""
    low = tl.full((CB, BLOCK), float("inf"), tl.float32)
    high = tl.full((CB, BLOCK), float("-inf"), tl.float32)
    peak = tl.zeros((CB, BLOCK), tl.float32)
    total = tl.zeros((CB, BLOCK), tl.float32)
    share = 1.0 / (H * W)  # applied before the sum, which then cannot overflow
    for start in range(0, H * W, BLOCK):
        cell = start + tl.arange(0, BLOCK)[None, :]
        here = alive & (cell < H * W)
        at = x + n.to(tl.int64) * x_n + channel.to(tl.int64) * x_c
        value = tl.load(at + (cell // W) * x_h + (cell % W) * x_w, mask=here, other=0.0)
        value = value.to(tl.float32)
        peak = tl.maximum(peak, tl.abs(value))
        total += value * share
        if MASKED:
            valid = tl.load(valid_cells + n.to(tl.int64) * H * W + cell, mask=cell < H * W, other=0)
            here = here & (valid != 0)
        low = tl.minimum(low, tl.where(here, value, float("inf")))
        high = tl.maximum(high, tl.where(here, value, float("-inf")))
    return tl.min(low, 1), tl.max(high, 1), tl.max(peak, 1), tl.sum(total, 1)


@triton.jit
def minmax_of(low, high, peak, min_range, noise):
    """Half of ``low`` and 2 / (high - low), or 0 and 0: the rule of ``half_low_and_scale``."""
    half_range = 0.5 * high - 0.5 * low
    varies = half_range > tl.maximum(0.5 * noise * peak, 0.5 * min_range)
    scale = tl.where(varies, 1.0 / tl.where(varies, half_range, 1.0), 0.0)
    return 0.5 * tl.where(varies, low, 0.0), scale


@triton.jit(do_not_specialize=["C", "H", "W", "PLANES"])
def range_kernel(
    x, y, valid_cells, planes, ranges,
    C, H, W, PLANES, min_range, noise,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    CB: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Fill the table of planes for ``moments_kernel``.

    Args:
        valid_cells: (N, H, W) uint8, if MASKED.
        planes: (6, PLANES), written: half_low, scale, shift of x; the same of y. SCALED: min-max
            scaling of each plane; else none.
        ranges: (8, PLANES), written: low, high, peak, mean of x; the same of y.
        min_range, noise: floors of a range, absolute and relative to the peak.
    """
    n, channel, alive = tile_place(C, CB)
    low_x, high_x, peak_x, mean_x = range_of(
        x, valid_cells, n, channel, alive, H, W, x_n, x_c, x_h, x_w, CB, BLOCK, MASKED
    )
    low_y, high_y, peak_y, mean_y = range_of(
        y, valid_cells, n, channel, alive, H, W, y_n, y_c, y_h, y_w, CB, BLOCK, MASKED
    )
    if SCALED:
        half_low_x, scale_x = minmax_of(low_x, high_x, peak_x, min_range, noise)
        half_low_y, scale_y = minmax_of(low_y, high_y, peak_y, min_range, noise)
    else:
        half_low_x, half_low_y = tl.zeros_like(low_x), tl.zeros_like(low_y)
        scale_x, scale_y = half_low_x + 2.0, half_low_y + 2.0
    channel, alive = tl.reshape(channel, (CB,)), tl.reshape(alive, (CB,))
    at = n * C + channel
    columns = (
        half_low_x, scale_x, (0.5 * mean_x - half_low_x) * scale_x,
        half_low_y, scale_y, (0.5 * mean_y - half_low_y) * scale_y,
    )  # fmt: skip
    for i in tl.static_range(6):
        tl.store(planes + i * PLANES + at, columns[i], mask=alive)
    found = (low_x, high_x, peak_x, mean_x, low_y, high_y, peak_y, mean_y)
    for i in tl.static_range(8):
        tl.store(ranges + i * PLANES + at, found[i], mask=alive)


@triton.jit(do_not_specialize=["C", "H", "W", "PLANES"])
def extrema_kernel(
    x, valid_cells, planes, ranges, sums, grad,
    C, H, W, PLANES, x_n, x_c, x_h, x_w, g_n, g_c, g_h, g_w,
    CB: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the gradient through the extrema of each plane (``min_max.add_extrema_gradient``).

    Args:
        sums: (2, PLANES, W) of ``gradient_kernel``.
        grad: (N, C, H, W), strides g_n ... g_w, added to.
        The others: as ``range_kernel``.
    """
    n, channel, alive = tile_place(C, CB)
    at = n * C + channel
    slope = 0.5 * tl.load(planes + PLANES + at, mask=alive, other=0.0)
    low = tl.load(ranges + at, mask=alive, other=0.0)
    high = tl.load(ranges + PLANES + at, mask=alive, other=0.0)
    sum_g, sum_gx = tl.zeros((CB, BLOCK), tl.float32), tl.zeros((CB, BLOCK), tl.float32)
    for start in range(0, W, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        here = sums + at.to(tl.int64) * W + column
        ok = alive & (column < W)
        sum_g += tl.load(here, mask=ok, other=0.0)
        sum_gx += tl.load(here + PLANES.to(tl.int64) * W, mask=ok, other=0.0)
    total_g, total_gx = tl.sum(sum_g, 1)[:, None], tl.sum(sum_gx, 1)[:, None]
    x_plane = x + n.to(tl.int64) * x_n + channel.to(tl.int64) * x_c
    g_plane = grad + n.to(tl.int64) * g_n + channel.to(tl.int64) * g_c
    lows, highs = tl.zeros((CB, BLOCK), tl.float32), tl.zeros((CB, BLOCK), tl.float32)
    for sweep in tl.static_range(2):  # count the ties, then add
        if sweep == 1:
            share_low = (total_gx - total_g) * slope / tl.maximum(tl.sum(lows, 1)[:, None], 1.0)
            share_high = -total_gx * slope / tl.maximum(tl.sum(highs, 1)[:, None], 1.0)
        for start in range(0, H * W, BLOCK):
            cell = start + tl.arange(0, BLOCK)[None, :]
            here = alive & (cell < H * W)
            if MASKED:
                valid = tl.load(
                    valid_cells + n.to(tl.int64) * H * W + cell, mask=cell < H * W, other=0
                )
                here = here & (valid != 0)
            value = tl.load(x_plane + (cell // W) * x_h + (cell % W) * x_w, mask=here, other=0.0)
            is_low = here & (value.to(tl.float32) == low)
            is_high = here & (value.to(tl.float32) == high)
            if sweep == 0:
                lows += tl.where(is_low, 1.0, 0.0)
                highs += tl.where(is_high, 1.0, 0.0)
            else:
                to = g_plane + (cell // W) * g_h + (cell % W) * g_w
                hit = is_low | is_high
                g = tl.load(to, mask=hit, other=0.0).to(tl.float32)
                g += tl.where(is_low, share_low, 0.0) + tl.where(is_high, share_high, 0.0)
                tl.store(to, g.to(grad.dtype.element_ty), mask=hit)
