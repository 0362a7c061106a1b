"""The distiller of a vision foundation model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch.nn import functional as F

from ssim_kd.losses import masked_mean
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    FrozenTeacher,
    LevelMaps,
    LoadedTeacher,
    PyramidDistiller,
    tappable_levels,
)
from ssim_kd.modeling.distillers.build import naming_keys
from ssim_kd.modeling.teacher import teacher_dtype

from .vit import TOKENS, vit_teacher


@DISTILLER_REGISTRY.register()
class VFMDistiller(PyramidDistiller):
    """1 - cosine of the student's cells, projected, and the patch tokens of a ViT.

    The ViT is a teacher next to the detector, which this method does not use. It sees the student's
    images. Its tokens are resized to the student's grid.

        VFMDistiller(vit=vit_teacher("vit_small_patch16_dinov3"), levels=["p4"])

    Attributes:
        vit: as it was found.
        loaded_vit: with its weights, from the first step on; not a module, no parameters.
    """

    keys = {"vit.name": "VFM.NAME", "vit.weights": "VFM.WEIGHTS", "vit.options": "VFM.OPTS"}
    defaults = {"levels": ("p4",)}

    @configurable
    def __init__(self, *, vit: FrozenTeacher, name: str = "vfm", **kwargs: Any) -> None:
        """
        Args:
            vit: from :func:`vit_teacher`, or a FrozenTeacher with one level "tokens".
            name: see :class:`Distiller`.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: not exactly one level.
        """
        # The projection is the adapter; a ViT's stride is not a level's.
        super().__init__(name=name, **{**kwargs, "adapter": "always", "resize": "bilinear"})
        if self.levels is not None and len(self.levels) != 1:
            raise ValueError(
                f"levels is {self.levels}; VFMDistiller expects one level, e.g. ['p4']."
            )
        self.vit = vit
        self.loaded_vit: LoadedTeacher | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the ViT of ``MODEL.DISTILL.VFM``.

        Raises:
            ValueError: OPTS are not pairs; what :func:`vit_teacher` raises.
        """
        found = super().from_config(cfg)
        name, weights, options = found["vit"].values()
        if len(options) % 2:
            raise ValueError(f"options is {options}; expected [NAME, VALUE, ...].")
        pairs = dict(zip(options[::2], options[1::2], strict=True))
        return {**found, "vit": vit_teacher(name, weights, pairs, dtype=teacher_dtype(cfg))}

    def bind(self, student: Any, teacher: FrozenTeacher) -> None:
        """Build the projection.

        Raises:
            ValueError: a level that the student lacks.
        """
        (level,) = self.levels
        levels = tappable_levels(student)
        if level not in levels:
            raise ValueError(
                f"levels names {level!r}, which the student lacks; it has {list(levels)}."
            )
        self._image_format = getattr(student, "input_format", None) or "BGR"
        self.vit.check([TOKENS], self._image_format)
        self.bind_shapes({level: levels[level]}, {level: self.vit.levels[TOKENS]})
        self.teacher_taps = ()

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :meth:`Distiller.forward`."""
        if self.loaded_vit is None:
            with naming_keys(self.key_names):
                loaded = self.vit.load([TOKENS], image_format=self._image_format)
            self.loaded_vit = loaded.to(batch.images[0].device)
        tokens = self.loaded_vit(batch.images)[TOKENS]
        return super().forward(student, {self.levels[0]: tokens}, batch)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """The mean over the images of the mean of 1 - cosine over the cells."""
        cosine = F.cosine_similarity(maps.student, maps.teacher, dim=1)
        return masked_mean(1 - cosine[:, None], maps.mask)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> "VFMDistiller":
        super()._apply(fn, *args, **kwargs)
        parameter = next(self.parameters(), None)
        if parameter is not None and self.loaded_vit is not None:
            self.loaded_vit.to(parameter.device)
        return self
