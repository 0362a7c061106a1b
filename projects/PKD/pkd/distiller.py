"""The distiller of PKD (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

import math
from typing import Any

import torch
from detectron2.config import configurable

from ssim_kd.losses import channel_moments
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PyramidDistiller,
    check_number,
)


def standardize(x: torch.Tensor, mask: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Bring each channel to mean 0 and standard deviation 1 over the batch and its cells.

    Args:
        x: (N, C, H, W), float32.
        mask: (N, H, W) bool, the cells that count; None: all.
        eps: added to the standard deviation.

    Returns:
        (N, C, H, W), 0 in the cells that do not count. Channels with a deviation of ``eps`` or less
        are 0 as well, and have no gradient.
    """
    mean, std = channel_moments(x, mask)
    centred = x - mean if mask is None else torch.where(mask[:, None], x - mean, 0.0)
    # In the authors' code a constant channel has a gradient of 1 / eps.
    return centred / torch.where(std > eps, std + eps, math.inf)


@DISTILLER_REGISTRY.register()
class PKDDistiller(PyramidDistiller):
    """Half the mean squared error of standardised maps: 1 - the Pearson correlation.

    The moments are those of the batch of one process: under DDP the loss is not the mean over the
    samples that a single process would take.
    """

    keys = {"eps": "PKD.EPS"}
    defaults = {"weight": 6.0, "levels": ("p2", "p3", "p4", "p5")}
    dense_defaults = {"weight": 10.0, "levels": ("p3", "p4", "p5", "p6")}

    @configurable
    def __init__(self, *, name: str = "pkd", eps: float = 1e-6, **kwargs: Any) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            eps: see :func:`standardize`.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: ``eps`` is not positive.
        """
        super().__init__(name=name, **kwargs)
        self.eps = check_number("eps", eps, above=0)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """The loss of one level."""
        student, teacher = (standardize(x, maps.mask, self.eps) for x in maps[1:3])
        cells = student[:, 0].numel() if maps.mask is None else maps.mask.sum().clamp(min=1)
        return (student - teacher).square().sum() / (cells * student.shape[1]) / 2
