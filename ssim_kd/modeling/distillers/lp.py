"""The l1 and l2 distillers that the paper compares SSIM with."""

from typing import Any

import torch
from detectron2.config import configurable

from ...losses import lp_loss
from ...ops.options import SCOPES, check_choice
from .base import DISTILLER_REGISTRY
from .batch import DistillBatch
from .pyramid import LevelMaps, PyramidDistiller

SCALINGS = (*SCOPES, "none")


def scaling_options(scaling: str, scaling_grad: bool) -> dict[str, Any]:
    """The options of a loss for a scaling.

    Raises:
        ValueError: an unknown scaling.
    """
    check_choice("scaling", scaling, SCALINGS)
    return {"scaling": None if scaling == "none" else scaling, "scaling_grad": scaling_grad}


class LpDistiller(PyramidDistiller):
    """The mean of |S - T| (l1) or (S - T)^2 (l2) of the scaled maps; see :func:`lp_loss`.

    LpDistiller(loss="l2", weight=4.0)
    """

    keys = {"scaling": "SCALING", "scaling_grad": "SCALING_GRAD"}
    defaults = {"weight": 4.0}
    float32 = False  # lp_loss takes each precision.

    def __init__(
        self,
        *,
        loss: str = "l2",
        name: str = "",
        scaling: str = "channel",
        scaling_grad: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            loss: "l1" or "l2".
            name: see :class:`Distiller`; the loss by default.
            scaling: "channel", "sample", "batch" or "none"; see :func:`minmax_scale`.
            scaling_grad: whether the gradient flows through the extrema.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: an unknown loss or scaling.
        """
        super().__init__(name=name or loss, **kwargs)
        check_choice("loss", loss, ("l1", "l2"))
        self.power = int(loss[1])
        self.options = scaling_options(scaling, scaling_grad)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """l1 or l2 of the scaled maps of one level."""
        return lp_loss(maps.student, maps.teacher, p=self.power, mask=maps.mask, **self.options)


@DISTILLER_REGISTRY.register()
class L1Distiller(LpDistiller):
    """:class:`LpDistiller` with the loss "l1"."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Arguments as there, without ``loss``."""
        super().__init__(loss="l1", **kwargs)


@DISTILLER_REGISTRY.register()
class L2Distiller(LpDistiller):
    """:class:`LpDistiller` with the loss "l2"."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Arguments as there, without ``loss``."""
        super().__init__(loss="l2", **kwargs)
