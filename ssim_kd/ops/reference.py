"""SSIM as the paper defines it, with derivatives by autograd.

The kernels in ``cpu`` and ``triton`` are tested against it. Source: de Rijk et al., "Structural
Knowledge Distillation for Object Detection", NeurIPS 2022.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import SSIMOptions
from .window import windowed_mean


class SSIMComponents(NamedTuple):
    """The three factors of SSIM, each (N, C, H, W), without their exponents."""

    luminance: Tensor
    contrast: Tensor
    structure: Tensor


class _Moments(NamedTuple):
    """Windowed means, variances and covariance, each (N, C, H, W)."""

    mean_x: Tensor
    mean_y: Tensor
    var_x: Tensor
    var_y: Tensor
    cov: Tensor


def _moments(x: Tensor, y: Tensor, options: SSIMOptions) -> _Moments:
    def mean(values: Tensor) -> Tensor:
        return windowed_mean(values, options.window_size, options.sigma)

    # A shift does not change variances, and E[x^2] - E[x]^2 loses no digits if E[x] is close to 0.
    shift_x = x.detach().mean(dim=(2, 3), keepdim=True)
    shift_y = y.mean(dim=(2, 3), keepdim=True)
    x, y = x - shift_x, y - shift_y
    a, b = mean(x), mean(y)
    return _Moments(
        mean_x=a + shift_x,
        mean_y=b + shift_y,
        var_x=mean(x * x) - a * a,
        var_y=mean(y * y) - b * b,
        cov=mean(x * y) - a * b,
    )


def _power(value: Tensor, exponent: float) -> Tensor:
    """``value ** exponent``, for a non-integer exponent sign(v) |v|^p, smooth around 0.

    Luminance and structure can be negative; a fractional power of that is not real. The smoothing
    keeps the slope below 1e4^(1-p).
    """
    if exponent == 1.0:
        return value
    if float(exponent).is_integer():
        return value ** int(exponent)
    return value * (value * value + 1e-8) ** ((exponent - 1.0) / 2.0)


def _luminance(m: _Moments, o: SSIMOptions) -> Tensor:
    return (2 * m.mean_x * m.mean_y + o.c1) / (m.mean_x**2 + m.mean_y**2 + o.c1 + o.eps)


def _contrast_structure(m: _Moments, o: SSIMOptions) -> tuple[Tensor, Tensor]:
    """Contrast and structure. They need standard deviations, hence square roots.

    A small common variance is added to both maps, and so to the covariance. It gives the root a
    finite slope, and equal maps still give exactly 1.
    """
    small = 1e-5 * o.c2 + o.eps
    var_x, var_y = m.var_x.clamp(min=0) + small, m.var_y.clamp(min=0) + small
    deviations = var_x.sqrt() * var_y.sqrt()
    c3 = o.c2 / 2
    contrast = (2 * deviations + o.c2) / (var_x + var_y + o.c2)
    return contrast, (m.cov + small + c3) / (deviations + c3)


def ssim_components(x: Tensor, y: Tensor, options: SSIMOptions) -> SSIMComponents:
    """Luminance, contrast and structure of (N, C, H, W) float32 or float64 maps."""
    with torch.autocast(x.device.type, enabled=False):
        moments = _moments(x, y.detach(), options)
        return SSIMComponents(_luminance(moments, options), *_contrast_structure(moments, options))


def ssim(x: Tensor, y: Tensor, options: SSIMOptions) -> Tensor:
    """SSIM = l^alpha c^beta s^gamma around every cell of (N, C, H, W) float32 or float64 maps.

    ``y`` is a constant. For padding "valid" the border is not cut; the caller gives it weight 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        m, o = _moments(x, y.detach(), options), options
        # If beta = gamma, only c * s is needed, in which the square roots cancel (C3 = C2 / 2).
        top1, bottom1 = 2 * m.mean_x * m.mean_y + o.c1, m.mean_x**2 + m.mean_y**2 + o.c1
        top2, bottom2 = 2 * m.cov + o.c2, m.var_x + m.var_y + o.c2
        if o.plain_exponents:
            return top1 * top2 / (bottom1 * bottom2 + o.eps)
        quality = torch.ones_like(x)
        if o.alpha != 0:
            quality = quality * _power(_luminance(m, o), o.alpha)
        if o.beta == o.gamma != 0:
            quality = quality * _power(top2 / (bottom2 + o.eps), o.beta)
        elif o.beta != o.gamma:
            contrast, structure = _contrast_structure(m, o)
            if o.beta != 0:
                quality = quality * _power(contrast, o.beta)
            if o.gamma != 0:
                quality = quality * _power(structure, o.gamma)
        return quality
