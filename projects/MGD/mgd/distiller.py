"""The distiller of MGD (Yang et al., ECCV 2022, arXiv 2205.01529)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import nn

from ssim_kd.losses import masked_mean, masked_sum, reference_size
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PyramidDistiller,
    check_number,
)


@DISTILLER_REGISTRY.register()
class MGDDistiller(PyramidDistiller):
    """||G(S o M) - T||^2 / N: the teacher's map, generated from a student's with holes.

    M is 0 in a random share of the cells, the same for all channels; G is conv3x3-ReLU-conv3x3.
    """

    keys = {"mask_ratio": "MGD.MASK_RATIO", "reference": "MGD.REFERENCE"}
    defaults = {"weight": 5e-7, "levels": ("p2", "p3", "p4", "p5"), "mask_ratio": 0.45}
    dense_defaults = {
        "weight": 2e-5,
        "levels": ("p3", "p4", "p5", "p6", "p7"),
        "mask_ratio": 0.65,
    }
    float32 = False  # The convolutions run in the training's precision.

    @configurable
    def __init__(
        self,
        *,
        name: str = "mgd",
        mask_ratio: float | None = None,
        reference: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            mask_ratio: share of the cells that are set to 0, in [0, 1); None for the method's own.
            reference: see :func:`reference_size`; () for the sum as it is.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        self.mask_ratio = check_number("mask_ratio", mask_ratio, least=0, below=1, optional=True)
        self.reference = reference_size("reference", reference)

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make G of each level."""
        self.generators = nn.ModuleDict()
        for level, shape in teacher.items():
            c = shape.channels
            self.generators[level] = nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)
            )

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """The loss of one level."""
        holes = self.random_mask(maps, batch)
        generated = self.generators[maps.level](maps.student * holes)
        error = (generated.float() - maps.teacher.float()).square()
        if self.reference is None:
            return masked_sum(error, maps.mask) / len(error)
        cells = self.reference.cells(self.strides[maps.level])
        return self.reference.channels * cells * masked_mean(error, maps.mask)

    def random_mask(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """Draw M, (N, 1, H, W) of 0 and 1."""
        n, _, height, width = maps.student.shape
        generator = batch.generator(self.name, maps.level)
        drawn = torch.rand(n, 1, height, width, generator=generator, device=generator.device)
        return (drawn >= self.mask_ratio).to(maps.student.dtype)
