"""Triton kernels of the SSIM loss; ``launch.py`` calls them, ``ops/autograd.py`` has the algebra.

A lane is one column of one plane; neighbouring lanes are neighbours in memory. A lane goes down its
rows. In each row it computes the horizontal means of four products over the 2 R + 1 columns around
it, and adds them to a vertical filter in registers: a tuple of partial sums, one for each output
row that the window covers. ``K`` is the window's size, ``R`` = K // 2 its radius; all loops over K
are unrolled. The tables of weights include the reflected border, so that no map is padded. Without
atomics, the same input gives the same bits.
"""

# Triton types its arguments at each launch and has no use for annotations.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zeros(K: tl.constexpr, BLOCK: tl.constexpr):
    """K partial sums of 0."""
    out = ()
    for _ in tl.static_range(K):
        out = out + (tl.zeros((BLOCK,), tl.float32),)
    return out


@triton.jit
def push(sums, value, weights, valid, K: tl.constexpr):
    """Advance the filter by one row: add ``value`` of row i, after which sums[0] is complete.

    sums[k] belongs to row i - R + k; ``weights`` points to the K weights of row i in those rows.
    """
    out = ()
    for k in tl.static_range(K - 1):
        out = out + (sums[k + 1] + tl.load(weights + k, mask=valid, other=0.0) * value,)
    return out + (tl.load(weights + K - 1, mask=valid, other=0.0) * value,)


@triton.jit
def lane_place(start, CN, C0, H, W, LANES, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Sample, channel and column of a block of lanes, and the distance to the next column's lane.

    The launch covers channels C0 ... C0 + CN - 1 of all samples. The axis that is dense in memory
    varies fastest: columns, or channels in channels-last maps.
    """
    lane = start + tl.arange(0, BLOCK)
    alive = lane < LANES
    if CHANNELS_LAST:
        column, step = (lane // CN) % W, CN
        channel = C0 + lane % CN
    else:
        column, step = lane % W, 1
        channel = C0 + (lane // W) % CN
    return lane, alive, lane // (CN * W), channel, column, step


@triton.jit
def load_scaled(pointers, half_low, scale, shift, mask):
    """The scaled values of cells, minus the shift of the plane."""
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return (0.5 * value - half_low) * scale - shift


# Sizes are not specialised (no variants for 1 or multiples of 16): one compilation serves all
# levels of a pyramid and all image sizes.
SIZES = ["C", "H", "W", "CN", "C0", "LANES", "PLANES"]


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x, y, weights, planes, row_in, row_out, column_in, scratch, partial,
    C, H, W, CN, C0, LANES, PLANES, uniform_weight, c1, c2, eps,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    K: tl.constexpr, BLOCK: tl.constexpr, GRAD: tl.constexpr, WEIGHTED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Weighted sum of (1 - S) / 2, and the vertical half of its gradient's adjoint filter.

    Args:
        x, y: maps (N, C, H, W), with their strides x_n ... y_w in elements.
        weights: (N, H, W) of the cells, if WEIGHTED; else each has ``uniform_weight``.
        planes: (6, PLANES): half_low, scale, shift of x; the same of y.
        row_in: (H, K), row i's weights in the means of rows i - R ... i + R.
        row_out: (H, K), weights of rows i - R ... i + R in the mean of row i.
        column_in: (W, K), weights of columns j - R ... j + R in the mean of column j.
        scratch: (3, H, LANES), written if GRAD: gradients for the moments a, q, r.
        partial: (programs,), written: each program's part of the loss.
        c1, c2, eps: the constants of SSIM.
    """
    R: tl.constexpr = K // 2
    lane, alive, sample, channel, column, _ = lane_place(
        tl.program_id(0) * BLOCK, CN, C0, H, W, LANES, BLOCK, CHANNELS_LAST
    )
    plane = planes + sample * C + channel
    half_low_x = tl.load(plane, mask=alive, other=0.0)
    scale_x = tl.load(plane + PLANES, mask=alive, other=0.0)
    shift_x = tl.load(plane + 2 * PLANES, mask=alive, other=0.0)
    half_low_y = tl.load(plane + 3 * PLANES, mask=alive, other=0.0)
    scale_y = tl.load(plane + 4 * PLANES, mask=alive, other=0.0)
    shift_y = tl.load(plane + 5 * PLANES, mask=alive, other=0.0)
    x_base = x + sample.to(tl.int64) * x_n + channel.to(tl.int64) * x_c
    y_base = y + sample.to(tl.int64) * y_n + channel.to(tl.int64) * y_c
    cells = weights + (sample.to(tl.int64) * H) * W + column
    slot = scratch + lane
    slots = LANES.to(tl.int64) * H

    sum_a, sum_b, sum_q, sum_r = zeros(K, BLOCK), zeros(K, BLOCK), zeros(K, BLOCK), zeros(K, BLOCK)
    back_a, back_q, back_r = zeros(K, BLOCK), zeros(K, BLOCK), zeros(K, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    # The mean of row o is complete R rows further down, the adjoint mean another R rows later.
    for i in range(H + (2 * R if GRAD else R)):
        inside = i < H
        a = tl.zeros((BLOCK,), tl.float32)
        b, q, r = a, a, a
        row = tl.minimum(i, H - 1).to(tl.int64)
        for k in tl.static_range(K):
            near = tl.minimum(tl.maximum(column + (k - R), 0), W - 1)  # its weight is 0 outside
            weight = tl.load(column_in + column * K + k, mask=alive & inside, other=0.0)
            xv = load_scaled(
                x_base + row * x_h + near * x_w, half_low_x, scale_x, shift_x, alive & inside
            )
            yv = load_scaled(
                y_base + row * y_h + near * y_w, half_low_y, scale_y, shift_y, alive & inside
            )
            a += weight * xv
            b += weight * yv
            q += weight * (xv * xv + yv * yv)
            r += weight * (xv * yv)
        sum_a = push(sum_a, a, row_in + i * K, inside, K)
        sum_b = push(sum_b, b, row_in + i * K, inside, K)
        sum_q = push(sum_q, q, row_in + i * K, inside, K)
        sum_r = push(sum_r, r, row_in + i * K, inside, K)

        o = i - R
        complete = (o >= 0) & (o < H)
        a, b = sum_a[0], sum_b[0]
        mean_x, mean_y = a + shift_x, b + shift_y
        h1 = mean_x * mean_y + 0.5 * c1
        b1 = mean_x * mean_x + mean_y * mean_y + c1
        h2 = sum_r[0] - a * b + 0.5 * c2
        b2 = sum_q[0] - a * a - b * b + c2
        inverse = 1.0 / (b1 * b2 + eps)
        s = 4.0 * h1 * h2 * inverse
        w = tl.zeros((BLOCK,), tl.float32) + uniform_weight
        if WEIGHTED:
            w = tl.load(cells + o * W, mask=alive & complete, other=0.0)
        total += tl.where(alive & complete, 0.5 * w * (1.0 - s), 0.0)
        if GRAD:
            d = -2.0 * w * inverse  # 4 (-1/2) w / (B1 B2): the gradient of the loss, not of S
            g_a = d * (b * (h2 - h1) + shift_y * h2 + 0.5 * s * (a * (b1 - b2) - shift_x * b2))
            g_q = -0.25 * d * s * b1
            g_r = d * h1
            back_a = push(back_a, g_a, row_out + o * K, complete, K)
            back_q = push(back_q, g_q, row_out + o * K, complete, K)
            back_r = push(back_r, g_r, row_out + o * K, complete, K)
            j = o - R
            store = alive & (j >= 0)
            tl.store(slot + j * LANES.to(tl.int64), back_a[0], mask=store)
            tl.store(slot + slots + j * LANES.to(tl.int64), back_q[0], mask=store)
            tl.store(slot + 2 * slots + j * LANES.to(tl.int64), back_r[0], mask=store)
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    x, y, planes, column_out, scratch, grad, sums,
    C, H, W, CN, C0, LANES, PLANES,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, g_n, g_c, g_h, g_w,
    K: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Horizontal half of the adjoint filter, and the gradient for the student's map.

    Args:
        column_out: (W, K), column j's weights in the means of columns j - R ... j + R.
        scratch: (3, H, LANES) of ``moments_kernel``.
        grad: (N, C, H, W), strides g_n ... g_w, written.
        sums: (2, PLANES, W), written if SUMS: sums down each column of g and of g x^, where g is
            the gradient for the scaled map x^.
        The others: as ``moments_kernel``.
    """
    R: tl.constexpr = K // 2
    lane, alive, sample, channel, column, step = lane_place(
        tl.program_id(0) * BLOCK, CN, C0, H, W, LANES, BLOCK, CHANNELS_LAST
    )
    plane = planes + sample * C + channel
    half_low_x = tl.load(plane, mask=alive, other=0.0)
    scale_x = tl.load(plane + PLANES, mask=alive, other=0.0)
    shift_x = tl.load(plane + 2 * PLANES, mask=alive, other=0.0)
    half_low_y = tl.load(plane + 3 * PLANES, mask=alive, other=0.0)
    scale_y = tl.load(plane + 4 * PLANES, mask=alive, other=0.0)
    shift_y = tl.load(plane + 5 * PLANES, mask=alive, other=0.0)
    n, c = sample.to(tl.int64), channel.to(tl.int64)
    x_cell = x + n * x_n + c * x_c + column * x_w
    y_cell = y + n * y_n + c * y_c + column * y_w
    g_cell = grad + n * g_n + c * g_c + column * g_w
    slots = LANES.to(tl.int64) * H
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_gx = tl.zeros((BLOCK,), tl.float32)
    for i in range(H):
        row = tl.cast(i, tl.int64)
        g_a = tl.zeros((BLOCK,), tl.float32)
        g_q, g_r = g_a, g_a
        for k in tl.static_range(K):
            near = tl.minimum(tl.maximum(column + (k - R), 0), W - 1)
            weight = tl.load(column_out + column * K + k, mask=alive, other=0.0)
            at = scratch + row * LANES + lane + (near - column) * step
            g_a += weight * tl.load(at, mask=alive, other=0.0)
            g_q += weight * tl.load(at + slots, mask=alive, other=0.0)
            g_r += weight * tl.load(at + 2 * slots, mask=alive, other=0.0)
        xv = load_scaled(x_cell + row * x_h, half_low_x, scale_x, shift_x, alive)
        yv = load_scaled(y_cell + row * y_h, half_low_y, scale_y, shift_y, alive)
        g = g_a + 2.0 * xv * g_q + yv * g_r
        sum_g += g
        sum_gx += g * (xv + shift_x)
        tl.store(g_cell + row * g_h, (0.5 * scale_x * g).to(grad.dtype.element_ty), mask=alive)
    if SUMS:
        at = (n * C + c) * W + column
        tl.store(sums + at, sum_g, mask=alive)
        tl.store(sums + PLANES.to(tl.int64) * W + at, sum_gx, mask=alive)
