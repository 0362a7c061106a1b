"""How many directions of its channels a teacher's maps use, for ``--eval-teacher``."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: After so many the rank is logged. It moves little with more.
IMAGES = 64


class ChannelMoments:
    """First and second moments of a level's channels over all cells of all maps that were added.

    Example:
        >>> moments = ChannelMoments()
        >>> moments.add(torch.tensor([[[[0.0, 1.0]], [[0.0, 2.0]]]]))  # two channels, one shape
        >>> round(moments.effective_rank(), 6)
        1.0
    """

    def __init__(self) -> None:
        self.images = self.cells = 0
        self.sums: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, maps: Tensor) -> None:
        """Count maps (N, C, H, W); H and W may differ from call to call."""
        cells = maps.detach().double().transpose(0, 1).flatten(1)
        self.images += len(maps)
        self.cells += cells.shape[1]
        self.sums = self.sums + cells.sum(1)
        self.products = self.products + cells @ cells.T

    def effective_rank(self) -> float:
        """The exponential of the entropy of the spectrum of the channels' covariance, 1 to C.

        C if all directions vary alike, near 1 if one of them does almost all of it, 1 if nothing
        varies (Roy & Vetterli, EUSIPCO 2007).
        """
        mean, square = (torch.as_tensor(x) / self.cells for x in (self.sums, self.products))
        values = torch.linalg.eigvalsh(square - torch.outer(mean, mean))
        # What is below is rounding, of the subtraction.
        values = torch.where(values > 1e-12 * square.trace(), values, 0)
        shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        return float(torch.special.entr(shares).sum().exp())


def log_ranks(model: nn.Module) -> None:
    """Log the effective rank of each level of a model's backbone once it has seen IMAGES images.

    A model without a ``backbone`` that returns maps by level is left as it is.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return
    moments: dict[str, ChannelMoments] = {}

    def look(_module: nn.Module, _inputs: Any, maps: Any) -> None:
        if not isinstance(maps, dict):
            handle.remove()
            return
        for level, found in maps.items():
            moments.setdefault(level, ChannelMoments()).add(found)
        if any(found.images >= IMAGES for found in moments.values()):
            handle.remove()
            ranks = ", ".join(
                f"{level} {moments[level].effective_rank():.1f} of {found.shape[1]}"
                for level, found in maps.items()
            )
            logger.info(
                "Effective rank of the teacher's maps, over %d images: %s channels. A level of low "
                "rank may harm: leave it out of MODEL.DISTILL.IN_FEATURES.",
                IMAGES,
                ranks,
            )

    handle = backbone.register_forward_hook(look)
