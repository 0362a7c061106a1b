"""Distillers of feature maps whose loss has several parts, each with a weight of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers import ShapeSpec

from .base import DistillBatch
from .checks import check_weight
from .pyramid import LevelMaps, PyramidDistiller


class PartsDistiller(PyramidDistiller):
    """A method whose loss of a level is a weighted sum of parts, which are logged one by one.

    A method defines :meth:`level_parts` in the place of ``level_loss``.

        class L1AndL2(PartsDistiller):
            def level_parts(self, maps, batch):
                difference = maps.student - maps.teacher
                return {
                    "l1": masked_mean(difference.abs(), maps.mask),
                    "l2": masked_mean(difference.square(), maps.mask),
                }

        L1AndL2(name="both", key="MODEL.DISTILL.BOTH", part_weights={"l1": 1.0, "l2": 0.5})
    """

    def __init__(
        self, *, name: str, key: str, part_weights: Mapping[str, float], **kwargs: Any
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            key: the node of the method's config keys, for messages: "MODEL.DISTILL.FGD".
            part_weights: by part, >= 0; the key of "fg" is FG_WEIGHT.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a weight that is negative or not finite.
        """
        super().__init__(name=name, **kwargs)
        self.part_weights = {
            part: check_weight(f"{key}.{part.upper()}_WEIGHT", weight)
            for part, weight in part_weights.items()
        }

    def bind_shapes(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """See :meth:`PyramidDistiller.bind_shapes`."""
        super().bind_shapes(student, teacher)
        self.scalar_weights = {
            f"{level}_{part}": of_level * of_part
            for level, of_level in zip(self.levels, self.level_weights, strict=True)
            for part, of_part in self.part_weights.items()
        }

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            student, teacher: maps (N, C, H, W) by level.
            batch: sizes and ground truth of the images.

        Returns:
            the sum over levels and parts by their weights, and each unweighted part by
            "{level}_{part}".
        """
        found: dict[str, torch.Tensor] = {}
        for level in self.levels:
            maps = self.align(level, student[level], teacher[level], batch)
            parts = self.level_parts(maps, batch)
            found.update({f"{level}_{k}": parts[k] for k in self.part_weights if k in parts})
        total = torch.stack([self.scalar_weights[k] * v for k, v in found.items()]).sum()
        return total, {k: v.detach() for k, v in found.items()}

    def level_parts(self, maps: LevelMaps, batch: DistillBatch) -> dict[str, torch.Tensor]:
        """The unweighted parts of the loss of one level, scalars, by their names.

        Some may be left out on a level.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define level_parts.")
