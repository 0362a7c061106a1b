"""The paper's distiller: feature maps compared by SSIM (de Rijk et al., NeurIPS 2022)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable

from ...losses import check_ssim_options, pyramid_ssim_loss
from .base import DISTILLER_REGISTRY, DistillBatch
from .lp import LpDistiller, scaling_options
from .pyramid import LevelMaps, PyramidDistiller

logger = logging.getLogger(__name__)


@DISTILLER_REGISTRY.register()
class SSIMDistiller(PyramidDistiller):
    """(1 - SSIM) / 2 of the maps of each level, scaled to [0, 1]; see :func:`ssim_loss`.

    SSIMDistiller(levels=["p2", "p3", "p4", "p5"], weight=4.0)
    """

    @configurable
    def __init__(
        self,
        *,
        name: str = "ssim",
        weight: Any = 4.0,
        scaling: str = "channel",
        scaling_grad: bool = True,
        ssim_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name, weight: see :class:`Distiller`.
            scaling: "channel", "sample", "batch" or "none"; see :func:`minmax_scale`.
            scaling_grad: whether the gradient flows through the extrema.
            ssim_options: further options of :func:`ssim_loss`.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: an unknown scaling, or an SSIM option out of its range.
        """
        super().__init__(name=name, weight=weight, **kwargs)
        self.options = scaling_options(scaling, scaling_grad) | (ssim_options or {})
        try:
            checked = check_ssim_options(**self.options)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"MODEL.DISTILL.SSIM: {error}") from error
        self._window_size = checked.window_size
        self._logged: set[str] = set()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the keys of SSIM."""
        distill = cfg.MODEL.DISTILL
        return {
            **super().from_config(cfg),
            "scaling": distill.SCALING,
            "scaling_grad": distill.SCALING_GRAD,
            "ssim_options": {key.lower(): value for key, value in distill.SSIM.items()},
        }

    def pyramid_loss(
        self, maps: Sequence[LevelMaps], batch: DistillBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All levels in one call; see :meth:`PyramidDistiller.pyramid_loss`."""
        self._log_small(maps)
        return pyramid_ssim_loss(
            [level.student for level in maps],
            [level.teacher for level in maps],
            masks=[level.mask if level.padded else None for level in maps],
            level_weights=self.level_weights,
            **self.options,
        )

    def _log_small(self, maps: Sequence[LevelMaps]) -> None:
        """Log once for each level that its maps are smaller than the window."""
        for level in maps:
            height, width = level.student.shape[-2:]
            if min(height, width) < self._window_size and level.level not in self._logged:
                self._logged.add(level.level)
                logger.info(
                    "Level %s has maps of %d x %d cells, smaller than MODEL.DISTILL.SSIM."
                    "WINDOW_SIZE %d: they are mirrored beyond their border until the window is "
                    "full, and every cell counts. Logged once.",
                    *(level.level, height, width, self._window_size),
                )


@DISTILLER_REGISTRY.register()
def FeatureDistiller(cfg: CfgNode) -> PyramidDistiller:
    """The paper's comparison: the distiller of ``MODEL.DISTILL.LOSS``, "ssim", "l1" or "l2".

    Raises:
        ValueError: another loss.
    """
    loss = cfg.MODEL.DISTILL.LOSS
    if loss not in ("ssim", "l1", "l2"):
        raise ValueError(f"MODEL.DISTILL.LOSS is {loss!r}; expected one of ('ssim', 'l1', 'l2').")
    return SSIMDistiller(cfg) if loss == "ssim" else LpDistiller(cfg)
