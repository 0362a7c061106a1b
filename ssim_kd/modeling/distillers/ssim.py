"""The paper's distiller: feature maps compared by SSIM (de Rijk et al., NeurIPS 2022)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable

from ...losses import check_ssim_options, pyramid_ssim_loss
from ...ops.options import SSIMOptions
from .base import DISTILLER_REGISTRY
from .batch import DistillBatch
from .lp import scaling_options
from .pyramid import LevelMaps, PyramidDistiller

logger = logging.getLogger(__name__)


@DISTILLER_REGISTRY.register()
class SSIMDistiller(PyramidDistiller):
    """(1 - SSIM) / 2 of the maps of each level, scaled to [0, 1]; see :func:`ssim_loss`.

    SSIMDistiller(levels=["p2", "p3", "p4", "p5"], weight=4.0)
    """

    keys = {"scaling": "SCALING", "scaling_grad": "SCALING_GRAD"} | {
        f"ssim_options.{name}": f"SSIM.{name.upper()}"
        for name in SSIMOptions.__dataclass_fields__
        if not name.startswith("scaling")
    }
    defaults = {"weight": 4.0}
    float32 = False  # ssim_loss takes each precision.

    @configurable
    def __init__(
        self,
        *,
        name: str = "ssim",
        scaling: str = "channel",
        scaling_grad: bool = True,
        ssim_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            scaling: "channel", "sample", "batch" or "none"; see :func:`minmax_scale`.
            scaling_grad: whether the gradient flows through the extrema.
            ssim_options: further options of :func:`ssim_loss`.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: an unknown scaling, or an SSIM option out of its range.
        """
        super().__init__(name=name, **kwargs)
        self.options = scaling_options(scaling, scaling_grad) | (ssim_options or {})
        try:
            checked = check_ssim_options(**self.options)
        except RuntimeError as error:  # an implementation that this machine lacks
            raise ValueError(str(error)) from error
        self._window_size = checked.window_size
        self._logged: set[str] = set()

    def pyramid_loss(
        self, maps: Sequence[LevelMaps], batch: DistillBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All levels in one call; see :meth:`PyramidDistiller.pyramid_loss`."""
        self._log_small(maps)
        return pyramid_ssim_loss(
            [level.student for level in maps],
            [level.teacher for level in maps],
            masks=[level.mask for level in maps],
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
                    "Level %s has maps of %d x %d cells, smaller than the window of SSIM, %d: they "
                    "are mirrored beyond their border until the window is full. On small images "
                    "fewer levels gained more.",
                    *(level.level, height, width, self._window_size),
                )
