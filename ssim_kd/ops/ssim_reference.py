"""SSIM written down as the paper has it: plain convolutions, derivatives by autograd.

Short and obvious on purpose; the fast implementations are tested against it. Equations are those
of de Rijk et al., "Structural Knowledge Distillation for Object Detection", NeurIPS 2022.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import SSIMOptions
from .window import gaussian_window, reflected_index

# Above this magnitude fourth powers near the end of float32. Maps are then multiplied by a power
# of two, and C1 and C2 by its square, which leaves SSIM as it is.
HUGE = 2.0**20
# C1 and C2 of a map that was made smaller do not vanish: flat parts would give 0 / 0.
MIN_CONSTANT = 1e-12


class SSIMComponents(NamedTuple):
    """The three factors of SSIM, each (N, C, H, W), without their exponents."""

    luminance: Tensor
    contrast: Tensor
    structure: Tensor


class _Moments(NamedTuple):
    """Windowed means, variances and covariance (N, C, H, W), and C1, C2, eps in the same units."""

    mean_x: Tensor
    mean_y: Tensor
    var_x: Tensor
    var_y: Tensor
    cov: Tensor
    c1: Tensor
    c2: Tensor
    eps: Tensor


def power_of_two_unit(peak: Tensor) -> Tensor:
    """The power of two to multiply maps by whose largest magnitude is ``peak``: 1 up to HUGE."""
    largest = 126 if peak.dtype == torch.float32 else 1022
    exponent = torch.frexp(peak).exponent.clamp(max=largest)
    unit = torch.ldexp(torch.ones_like(peak), -exponent)
    return torch.where(peak > HUGE, unit, torch.ones_like(peak))


def _windowed_mean(x: Tensor, options: SSIMOptions) -> Tensor:
    """Gaussian mean around every cell, (N, C, H, W) to the same, reflected at the border."""
    n, c, h, w = x.shape
    radius = options.window_size // 2
    rows = reflected_index(h, radius).to(x.device)
    columns = reflected_index(w, radius).to(x.device)
    weight = gaussian_window(options.window_size, options.sigma).to(x)
    planes = x.reshape(n * c, 1, h, w).index_select(2, rows).index_select(3, columns)
    planes = F.conv2d(planes, weight.view(1, 1, -1, 1))
    return F.conv2d(planes, weight.view(1, 1, 1, -1)).view(n, c, h, w)


def _moments(x: Tensor, y: Tensor, options: SSIMOptions) -> _Moments:
    both = torch.maximum(x.detach().abs(), y.abs())
    unit = power_of_two_unit(both.amax(dim=(2, 3), keepdim=True))
    x, y = x * unit, y * unit
    smallest = torch.where(unit < 1, MIN_CONSTANT, 0.0)
    # Variances do not depend on a shift. Close to zero, E[x^2] - E[x]^2 loses no digits.
    shift_x = x.detach().mean(dim=(2, 3), keepdim=True)
    shift_y = y.mean(dim=(2, 3), keepdim=True)
    x, y = x - shift_x, y - shift_y
    a, b = _windowed_mean(x, options), _windowed_mean(y, options)
    return _Moments(
        mean_x=a + shift_x,
        mean_y=b + shift_y,
        var_x=_windowed_mean(x * x, options) - a * a,
        var_y=_windowed_mean(y * y, options) - b * b,
        cov=_windowed_mean(x * y, options) - a * b,
        c1=torch.maximum(options.c1 * unit**2, smallest),
        c2=torch.maximum(options.c2 * unit**2, smallest),
        eps=options.eps * unit**4,
    )


def _power(value: Tensor, exponent: float) -> Tensor:
    """``value ** exponent``; for a non-integer exponent odd, and smooth around 0.

    Luminance and structure can be negative, where a fractional power does not exist. Then
    sign(v) |v|^p is meant, rounded off near 0, so that its slope stays below 1e4^(1-p).
    """
    if exponent == 1.0:
        return value
    if float(exponent).is_integer():
        return value ** int(exponent)
    return value * (value * value + 1e-8) ** ((exponent - 1.0) / 2.0)


def _luminance(m: _Moments) -> Tensor:
    top = 2 * m.mean_x * m.mean_y + m.c1
    return top / (m.mean_x**2 + m.mean_y**2 + m.c1 + m.eps)


def _contrast_structure(m: _Moments) -> tuple[Tensor, Tensor]:
    """Contrast and structure by themselves. They need standard deviations, hence square roots.

    A little common variance is added to both maps (and so to the covariance): the root then has a
    finite slope, and equal maps still give exactly 1.
    """
    little = 1e-5 * m.c2 + m.eps
    var_x, var_y = m.var_x.clamp(min=0) + little, m.var_y.clamp(min=0) + little
    deviations = var_x.sqrt() * var_y.sqrt()
    c3 = m.c2 / 2
    contrast = (2 * deviations + m.c2) / (var_x + var_y + m.c2)
    return contrast, (m.cov + little + c3) / (deviations + c3)


def ssim_components_reference(x: Tensor, y: Tensor, options: SSIMOptions) -> SSIMComponents:
    """Luminance, contrast and structure of (N, C, H, W) float32 or float64 maps."""
    with torch.autocast(x.device.type, enabled=False):
        moments = _moments(x, y, options)
        return SSIMComponents(_luminance(moments), *_contrast_structure(moments))


def ssim_map_reference(x: Tensor, y: Tensor, options: SSIMOptions) -> Tensor:
    """SSIM = l^alpha c^beta s^gamma around every cell of (N, C, H, W) float32 or float64 maps.

    ``y`` is treated as a constant. The map is not cut for padding "valid"; the caller weighs it.
    """
    with torch.autocast(x.device.type, enabled=False):
        m = _moments(x, y.detach(), options)
        # With beta = gamma only c * s is needed, in which the square roots cancel (C3 = C2 / 2).
        top1, bottom1 = 2 * m.mean_x * m.mean_y + m.c1, m.mean_x**2 + m.mean_y**2 + m.c1
        top2, bottom2 = 2 * m.cov + m.c2, m.var_x + m.var_y + m.c2
        if options.plain_exponents:
            return top1 * top2 / (bottom1 * bottom2 + m.eps)
        ssim = torch.ones_like(x)
        if options.alpha != 0:
            ssim = ssim * _power(_luminance(m), options.alpha)
        if options.beta == options.gamma != 0:
            ssim = ssim * _power(top2 / (bottom2 + m.eps), options.beta)
        elif options.beta != options.gamma:
            contrast, structure = _contrast_structure(m)
            if options.beta != 0:
                ssim = ssim * _power(contrast, options.beta)
            if options.gamma != 0:
                ssim = ssim * _power(structure, options.gamma)
        return ssim
