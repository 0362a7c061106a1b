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
    g_r = d A1,  g_q = -d S B1 / 2,  g_a = d mu_y A2 - b g_r - d S B2 mu_x - 2 a g_q
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


class Maps(NamedTuple):
    """What the two functions below work on; everything is written.

    ``moments`` (4, H, n W): a, b, q + C2, r + C2 / 2 (the window's weights sum to 1, so a constant
    may be added before it), then a, b, B2, h2. ``work`` (4, H, n W), ``mean_x``, ``mean_y`` and
    ``inverse`` (H, n W).
    """

    moments: Tensor
    work: Tensor
    mean_x: Tensor
    mean_y: Tensor
    inverse: Tensor


def ssim_in_place(maps: Maps, rows: Rows) -> Tensor:
    """S / 4 of a chunk, a view of ``work``, whose last map is free afterwards."""
    a, b, q, r = maps.moments
    h1, b1, s4, _ = maps.work
    r.addcmul_(a, b, value=-1)  # h2
    q.addcmul_(a, a, value=-1).addcmul_(b, b, value=-1)  # B2
    mean_x = torch.add(a, rows.shift_x, out=maps.mean_x)
    mean_y = torch.add(b, rows.shift_y, out=maps.mean_y)
    torch.addcmul(0.5 * rows.c1, mean_x, mean_y, out=h1)
    torch.addcmul(rows.c1, mean_x, mean_x, out=b1).addcmul_(mean_y, mean_y)
    torch.addcmul(rows.eps, b1, q, out=maps.inverse).reciprocal_()
    torch.mul(h1, r, out=s4)
    return s4.mul_(maps.inverse)


def moment_gradients_in_place(maps: Maps, weights: Tensor | None) -> None:
    """Gradient of sum(weights S / 4) for the moments, after ``ssim_in_place``.

    Afterwards the first three of ``work`` are g_r, -g_q and g_a.

    Args:
        maps: as ``ssim_in_place`` left them.
        weights: (H, n W), or None for 1.
    """
    a, b, b2, h2 = maps.moments
    h1, b1, s4, _ = maps.work
    d = maps.inverse if weights is None else maps.inverse.mul_(weights)
    g_r, h2_d, s4_d = h1.mul_(d), h2.mul_(d), s4.mul_(d)
    minus_g_q, s4_b2_d = b1.mul_(s4_d), b2.mul_(s4_d)
    g_a = torch.mul(maps.mean_y, h2_d, out=s4)
    g_a.addcmul_(b, g_r, value=-1)
    g_a.addcmul_(maps.mean_x, s4_b2_d, value=-2).addcmul_(a, minus_g_q, value=2)
