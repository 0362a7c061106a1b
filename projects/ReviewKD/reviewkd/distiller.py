"""The distiller of ReviewKD (Chen et al., CVPR 2021, arXiv 2104.09044)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from ssim_kd.losses import masked_mean
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    CellBatchNorm,
    DistillBatch,
    LevelMaps,
    PyramidDistiller,
    check_number,
)

#: Sides of the maps to which both are pooled, next to their full size.
POOLED_SIDES = (4, 2, 1)


class Fusion(nn.Module):
    """Attention based fusion of a level with the one above it."""

    def __init__(
        self, channels: int, inner: int, out: int, *, fuses: bool, norm: str = "BN"
    ) -> None:
        """
        Args:
            channels: of the student's map.
            inner: of the map that passes to the level below.
            out: of the teacher's map.
            fuses: whether there is a level above.
            norm: after the convolutions.
        """
        super().__init__()

        def normed(channels: int) -> nn.Module:
            return CellBatchNorm(channels) if norm == "BN" else get_norm(norm, channels)

        self.reduce = Conv2d(channels, inner, 1, bias=False, norm=normed(inner))
        self.attention = nn.Conv2d(2 * inner, 2, 1) if fuses else None
        self.expand = Conv2d(inner, out, 3, padding=1, bias=False, norm=normed(out))
        for convolution in (self.reduce, self.expand):
            weight_init.c2_xavier_fill(convolution)

    def forward(
        self, x: torch.Tensor, above: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: the student's map (N, C, H, W).
            above: what the level above passed on, (N, inner, h, w).

        Returns:
            the map that is compared with the teacher's, (N, out, H, W), and what passes on.
        """
        x = self.reduce(x)
        if self.attention is not None and above is not None:
            y = F.interpolate(above, size=x.shape[-2:], mode="nearest").to(x.dtype)
            ours, theirs = self.attention(torch.cat([x, y], dim=1)).sigmoid().split(1, dim=1)
            x = x * ours + y * theirs
        return self.expand(x), x


def hierarchical_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The hierarchical context loss of a level.

    [MSE(S, T) + sum_i 2^-i MSE(pool_l S, pool_l T)] / (1 + sum_i 2^-i), over the sides l in 4, 2, 1
    that are less than the height, i = 1, 2, ...

    Args:
        student, teacher: (N, C, H, W).
        mask: (N, H, W) bool, True where a cell counts; None: all do.

    Returns:
        scalar, the mean over the samples.
    """
    # In half precision the mean over many cells loses its digits.
    difference = student.float() - teacher.float()
    total, factor, weights = masked_mean(difference.square(), mask), 1.0, 1.0
    if mask is None:
        cells = torch.ones_like(difference[:, :1])
    else:
        cells = mask[:, None].float()
        difference = torch.where(mask[:, None], difference, 0.0)
    for side in POOLED_SIDES:
        if side >= student.shape[-2]:
            continue
        factor /= 2
        weights += factor
        share = F.adaptive_avg_pool2d(cells, side)
        pooled = F.adaptive_avg_pool2d(difference, side) / share.clamp(min=1e-12)
        total = total + factor * masked_mean(pooled.square(), share[:, 0] > 0)
    return total / weights


@DISTILLER_REGISTRY.register()
class ReviewKDDistiller(PyramidDistiller):
    """Each level of the teacher is learned from that level of the student and those above it.

    From the coarsest level down, :class:`Fusion` joins a map with what the level above passed on;
    :func:`hierarchical_loss` compares the result with the teacher's map.
    """

    keys = {"channels": "REVIEWKD.CHANNELS", "norm": "REVIEWKD.NORM"}
    adapts = False  # Fusion brings the student's channels to the teacher's.
    float32 = False  # The convolutions run in the training's precision.

    @configurable
    def __init__(
        self, *, name: str = "reviewkd", channels: int = 256, norm: str = "BN", **kwargs: Any
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            channels: of what passes from level to level, > 0.
            norm: of the fusions: "BN", "SyncBN", "GN" or another of Detectron2's.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        self.channels = check_number("channels", channels, least=1, whole=True)
        self.norm = norm

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """One fusion a level, the coarsest without attention.

        Raises:
            ValueError: a norm that Detectron2 has not, or that does not fit the channels.
        """
        # The coarsest first.
        self.order = sorted(self.levels, key=lambda level: -self.strides[level])
        try:
            self.fusions = nn.ModuleDict(
                {
                    level: Fusion(
                        *(student[level].channels, self.channels, teacher[level].channels),
                        fuses=level != self.order[0],
                        norm=self.norm,
                    )
                    for level in self.order
                }
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"norm is {self.norm!r} for {self.channels} `channels` and the teacher's "
                f"{[shape.channels for shape in teacher.values()]}; expected a norm of Detectron2 "
                f"that fits them: {error}"
            ) from error

    def pyramid_loss(
        self, maps: Sequence[LevelMaps], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """See :meth:`PyramidDistiller.pyramid_loss`."""
        by_level, found, above = {m.level: m for m in maps}, {}, None
        for level in self.order:
            fused, above = self.fusions[level](by_level[level].student, above)
            found[level] = hierarchical_loss(fused, *by_level[level][2:])
        return {level: found[level] for level in self.levels}
