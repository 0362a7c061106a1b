"""How many directions of its channels a teacher's maps use: in ``--eval-teacher`` and training."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: After so many the rank is logged. On digits 64 images move it by a quarter at most.
IMAGES = 16
#: What the scalars of a training begin with; the level follows.
TEACHER_RANK = "teacher_rank/"


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
        self.sums: Any = 0.0
        self.products: Any = 0.0

    def add(self, maps: Tensor) -> None:
        """Count maps (N, C, H, W); H and W may differ from call to call."""
        for image in maps.detach():  # one by one: in double precision, a copy of all is large
            cells = image.double().flatten(1)
            self.images += 1
            self.cells += cells.shape[1]
            self.sums = self.sums + cells.sum(1)
            self.products = self.products + cells @ cells.T

    def effective_rank(self) -> float:
        """The exponential of the entropy of the spectrum of the channels' covariance, 1 to C.

        C if all directions vary alike, near 1 if one of them does almost all of it, 1 if nothing
        varies (Roy & Vetterli, EUSIPCO 2007); NaN of maps that are not finite.
        """
        mean, square = self.sums / self.cells, self.products / self.cells
        if not torch.isfinite(square).all():
            return math.nan
        values = torch.linalg.eigvalsh(square - torch.outer(mean, mean))
        # What is below is rounding, of the subtraction.
        values = torch.where(values > 1e-12 * square.trace(), values, 0)
        shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        return float(torch.special.entr(shares).sum().exp())


class MapRanks:
    """Finds the effective rank of each level over the first IMAGES images, and logs it once.

    Cells of the padding count.

    Attributes:
        done: whether nothing more is counted.
    """

    def __init__(self) -> None:
        self.done = False
        self._levels: dict[str, ChannelMoments] = {}

    def add(self, maps: Mapping[str, Any]) -> dict[str, float]:
        """Count maps (N, C, H, W) by level; what is no map is left out.

        Returns:
            once, the ranks by "teacher_rank/LEVEL"; otherwise nothing.
        """
        if self.done:
            return {}
        for level, found in maps.items():
            if isinstance(found, Tensor) and found.dim() == 4:
                self._levels.setdefault(level, ChannelMoments()).add(found)
        images = max((level.images for level in self._levels.values()), default=0)
        self.done = images == 0 or images >= IMAGES
        if not (self.done and images):
            return {}
        ranks = {name: level.effective_rank() for name, level in self._levels.items()}
        logger.info(
            "Effective rank of the teacher's maps, over %d images: %s channels (docs/teachers.md).",
            images,
            ", ".join(f"{n} {ranks[n]:.1f} of {len(x.products)}" for n, x in self._levels.items()),
        )
        self._levels.clear()
        return {f"{TEACHER_RANK}{name}": rank for name, rank in ranks.items()}


def log_ranks(model: nn.Module) -> None:
    """Log the effective rank of each level of a model's backbone once it has seen IMAGES images.

    A model without a ``backbone`` that returns maps by level is left as it is.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return
    ranks = MapRanks()

    def look(_module: nn.Module, _inputs: Any, maps: Any) -> None:
        ranks.add(maps if isinstance(maps, dict) else {})
        if ranks.done:
            handle.remove()

    handle = backbone.register_forward_hook(look)
