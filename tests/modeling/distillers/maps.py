"""Maps of two levels, with and without padding, and distillers bound to them."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ShapeSpec

from ssim_kd.modeling import DistillBatch, LpDistiller, PyramidDistiller, SSIMDistiller

SIZES = {"p3": (12, 16), "p4": (6, 8)}
STRIDES = {"p3": 8, "p4": 16}

#: 96 x 128 pixels fill the maps; 57 x 100 leave cells of padding.
FULL = DistillBatch([(96, 128), (96, 128)])
PADDED = DistillBatch([(96, 128), (57, 100)])


def specs(channels: int = 4, strides: dict[str, int] = STRIDES) -> dict[str, ShapeSpec]:
    """Channels and strides by level."""
    return {k: ShapeSpec(channels=channels, stride=stride) for k, stride in strides.items()}


def features(*, seed: int, channels: int = 4) -> dict[str, torch.Tensor]:
    """Random maps (2, C, H, W) by level."""
    generator = torch.Generator().manual_seed(seed)
    return {
        level: torch.randn(2, channels, *size, generator=generator) * 3 + 1
        for level, size in SIZES.items()
    }


def leaves(*, seed: int) -> dict[str, torch.Tensor]:
    """As :func:`features`, with gradients."""
    return {level: value.requires_grad_() for level, value in features(seed=seed).items()}


def masks(batch: DistillBatch) -> dict[str, torch.Tensor]:
    """The cells that count by level."""
    return {level: batch.valid_mask(*SIZES[level], STRIDES[level]) for level in SIZES}


def bound(distiller: PyramidDistiller) -> PyramidDistiller:
    """The distiller, bound to a student and a teacher of these levels."""
    distiller.bind_shapes(specs(), specs())
    return distiller


def make(loss: str = "ssim", **options: Any) -> PyramidDistiller:
    """A bound distiller of the paper's comparison: "ssim", "l1" or "l2"."""
    if loss == "ssim":
        return bound(SSIMDistiller(**options))
    return bound(LpDistiller(loss=loss, **options))
