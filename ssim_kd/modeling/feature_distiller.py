"""The paper's distiller: feature maps compared by SSIM, l1 or l2."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

from ..losses import check_ssim_options, lp_loss, pyramid_ssim_loss
from .distiller import DISTILLER_REGISTRY, Distiller

logger = logging.getLogger(__name__)

LOSSES = ("ssim", "l1", "l2")


@DISTILLER_REGISTRY.register()
class FeatureDistiller(Distiller):
    """The paper's loss: the maps of each level, scaled to [0, 1], compared by SSIM, l1 or l2."""

    @configurable
    def __init__(
        self,
        *,
        loss: str = "ssim",
        scaling: str = "channel",
        scaling_grad: bool = True,
        ssim_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            loss: "ssim", "l1" or "l2".
            scaling: "channel", "sample", "batch" or "none"; see :func:`minmax_scale`.
            scaling_grad: whether the gradient flows through the extrema.
            ssim_options: further options of :func:`ssim_loss`.
            kwargs: of :class:`Distiller`.

        Raises:
            ValueError: an unknown loss or scaling, or an SSIM option out of its range.
        """
        super().__init__(**kwargs)
        if loss not in LOSSES:
            raise ValueError(f"MODEL.DISTILL.LOSS is {loss!r}; expected one of {LOSSES}.")
        scopes = ("channel", "sample", "batch", "none")
        if scaling not in scopes:
            raise ValueError(f"MODEL.DISTILL.SCALING is {scaling!r}; expected one of {scopes}.")
        self.loss_name = loss
        self.options: dict[str, Any] = {
            "scaling": None if scaling == "none" else scaling,
            "scaling_grad": scaling_grad,
        }
        if loss == "ssim":
            self.options |= ssim_options or {}
            try:
                check_ssim_options(**self.options)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"MODEL.DISTILL.SSIM: {error}") from error
        self._told: set[str] = set()

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student_shapes: dict[str, ShapeSpec],
        teacher_shapes: dict[str, ShapeSpec],
    ) -> dict[str, Any]:
        """What :class:`Distiller` takes, and the keys of the losses."""
        distill = cfg.MODEL.DISTILL
        return {
            **super().from_config(cfg, student_shapes, teacher_shapes),
            "loss": distill.LOSS,
            "scaling": distill.SCALING,
            "scaling_grad": distill.SCALING_GRAD,
            "ssim_options": {key.lower(): value for key, value in distill.SSIM.items()},
        }

    def pyramid_loss(
        self,
        students: list[torch.Tensor],
        teachers: list[torch.Tensor],
        masks: list[torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SSIM takes the levels in one call; l1 and l2 are taken level by level."""
        if self.loss_name != "ssim":
            return super().pyramid_loss(students, teachers, masks)
        self._tell_small(students)
        return pyramid_ssim_loss(
            students, teachers, masks=masks, level_weights=self.level_weights, **self.options
        )

    def _tell_small(self, maps: list[torch.Tensor]) -> None:
        """Say once of a level that its maps are smaller than the window."""
        size = self.options.get("window_size", 11)
        for level, features in zip(self.levels, maps, strict=True):
            height, width = features.shape[-2:]
            if min(height, width) < size and level not in self._told:
                self._told.add(level)
                logger.info(
                    "Level %s has maps of %d x %d cells, smaller than MODEL.DISTILL.SSIM."
                    "WINDOW_SIZE %d: beyond their border they are mirrored until the window is "
                    "full, and every cell counts. Said once.",
                    *(level, height, width, size),
                )

    def level_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """l1 or l2 of the scaled maps."""
        return lp_loss(student, teacher, p=int(self.loss_name[1]), mask=mask, **self.options)
