"""SSIM and its gradient from filtered moments, in closed form, in place, on one chunk of planes.

Notation, for one cell; G is the windowed mean, s and t are numbers near the planes' means:

    x' = x - s, y' = y - t                          moments of small numbers lose no digits
    a, b, q, r = G[x'], G[y'], G[x'^2 + y'^2], G[x'y']
    mu_x = a + s, mu_y = b + t                      the paper's means
    A1 = 2 mu_x mu_y + C1     B1 = mu_x^2 + mu_y^2 + C1         l = A1 / B1
    A2 = 2 (r - a b) + C2     B2 = q - a^2 - b^2 + C2           c s = A2 / B2
    S = A1 A2 / (B1 B2)

Only sigma_x^2 + sigma_y^2 enters (beta = gamma), so four filtered maps do instead of five. The
gradient of sum(w S) for x follows from the chain rule through a, q and r, with G' the adjoint:

    d = 2 w / (B1 B2)
    g_a = d (mu_y A2 - b A1 + S (a B1 - mu_x B2)),  g_q = -d S B1 / 2,  g_r = d A1
    gradient = G'[g_a] + 2 x' G'[g_q] + y' G'[g_r]

The code works with h1 = A1 / 2, h2 = A2 / 2 and S / 4 = h1 h2 / (B1 B2), which saves passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Numbers that are constant in a plane, spread along a row of a chunk: (n W,) or () each."""

    shift_x: Tensor
    shift_y: Tensor
    c1: Tensor
    c2: Tensor
    eps: Tensor


def ssim_in_place(moments: Tensor, work: Tensor, inverse: Tensor, rows: Rows) -> Tensor:
    """S / 4 of a chunk.

    Args:
        moments: (4, H, n W): a, b, q + C2, r + C2 / 2 (the window's weights sum to 1, so a
            constant may be added before it). Becomes a, b, B2, h2.
        work: (4, H, n W), written: h1, B1, S / 4, scratch.
        inverse: (H, n W), written: 1 / (B1 B2).

    Returns:
        S / 4, a view of ``work``.
    """
    a, b, q, r = moments
    h1, b1, s4, scratch = work
    r.addcmul_(a, b, value=-1)  # h2
    q.addcmul_(a, a, value=-1).addcmul_(b, b, value=-1)  # B2
    mean_x, mean_y = torch.add(a, rows.shift_x, out=s4), torch.add(b, rows.shift_y, out=scratch)
    torch.addcmul(0.5 * rows.c1, mean_x, mean_y, out=h1)
    torch.addcmul(rows.c1, mean_x, mean_x, out=b1).addcmul_(mean_y, mean_y)
    torch.addcmul(rows.eps, b1, q, out=inverse).reciprocal_()
    torch.mul(h1, r, out=s4)
    return s4.mul_(inverse)


def moment_gradients_in_place(
    moments: Tensor, work: Tensor, inverse: Tensor, rows: Rows, weight: Tensor | float
) -> None:
    """Gradient of sum(weight S) for a, q and r, after ``ssim_in_place``.

    The differences are taken so that nearly constant planes, where a and b are tiny beside the
    means, lose no digits.

    Args:
        moments, work, inverse: as ``ssim_in_place`` left them; all are overwritten. Afterwards
            ``work`` holds g_r, -g_q, g_a and scratch.
        weight: a number, or a tensor that broadcasts to (H, n W).
    """
    a, b, b2, h2 = moments
    h1, b1, s4, luminance = work
    d = inverse.mul_(4 * weight)
    # mu_y A2 - b A1 = 2 (b (h2 - h1) + t h2)
    torch.sub(h2, h1, out=luminance)
    luminance.mul_(b).addcmul_(rows.shift_y, h2)
    h1.mul_(d)  # g_r
    # a B1 - mu_x B2 = a (B1 - B2) - s B2
    torch.sub(b1, b2, out=h2)
    h2.mul_(a).addcmul_(rows.shift_x, b2, value=-1).mul_(s4)
    luminance.add_(h2, alpha=2)
    b1.mul_(s4).mul_(d)  # -g_q
    torch.mul(luminance, d, out=s4)  # g_a
