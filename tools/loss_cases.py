"""The losses that are compared, and the maps that they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ssim_kd.losses import pyramid_ssim_loss, ssim_loss

Loss = Callable[[Tensor, Tensor], Tensor]
# p2 ... p6 of an 800 x 1333 image.
PYRAMID = {"p2": (200, 336), "p3": (100, 168), "p4": (50, 84), "p5": (25, 42), "p6": (13, 21)}
# Ours by name, with the options of each.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, min-max": {"scaling": "channel"},
    "ours, eager": {"impl": "eager"},
    "ours, reference": {"impl": "reference"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def losses(device: torch.device) -> dict[str, Loss]:
    """Ours and every peer that can be imported, by name; all are SSIM with an 11-wide Gaussian."""
    found: dict[str, Loss] = {name: partial(ssim_loss, **options) for name, options in OURS.items()}
    try:
        import kornia

        found["kornia"] = lambda x, y: kornia.losses.ssim_loss(x, y, 11)
    except ImportError:
        pass
    try:
        from pytorch_msssim import ssim

        found["pytorch-msssim"] = lambda x, y: 0.5 - 0.5 * ssim(x, y, data_range=1.0)
    except ImportError:
        pass
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as measure

        found["torchmetrics"] = lambda x, y: torch.as_tensor(
            0.5 - 0.5 * cast(Tensor, measure(x, y, data_range=1.0))
        )
    except ImportError:
        pass
    try:
        import piq

        found["piq"] = lambda x, y: (1 - piq.ssim(x, y, downsample=False)) / 2
    except ImportError:
        pass
    if device.type == "cuda":
        try:
            from fused_ssim import fused_ssim

            found["fused-ssim"] = lambda x, y: (1 - fused_ssim(x, y)) / 2
        except ImportError:
            pass
    found["MSE"] = lambda x, y: torch.nn.functional.mse_loss(x, y)
    return found


def over_pyramid(name: str, loss: Loss) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """The sum over levels: one call for ours, a loop for the others."""
    if name in OURS:
        return lambda xs, ys: pyramid_ssim_loss(xs, ys, **OURS[name])[0]
    return lambda xs, ys: torch.stack([loss(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


class Case:
    """One set of maps: a level or the pyramid, a batch size and a type."""

    def __init__(
        self, level: str, n: int, channels: int, dtype: str, device: torch.device, seed: int = 0
    ):
        sizes = list(PYRAMID.values()) if level == "pyramid" else [PYRAMID[level]]
        g = torch.Generator().manual_seed(seed)
        self.level, self.n, self.dtype, self.device = level, n, dtype, device
        self.elements = sum(n * channels * h * w for h, w in sizes)

        def make() -> list[Tensor]:
            maps = (torch.rand(n, channels, h, w, generator=g) for h, w in sizes)
            return [m.to(device, DTYPES[dtype]) for m in maps]

        self.inputs, self.targets = make(), make()

    def run(self, name: str, loss: Loss) -> None:
        """Forward and backward, after what an optimizer's ``zero_grad`` does."""
        for x in self.inputs:
            x.grad = None
            x.requires_grad_()
        over_pyramid(name, loss)(self.inputs, self.targets).backward()
