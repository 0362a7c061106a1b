"""The l1 and l2 distillers that the paper compares SSIM with."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable

from ...losses import lp_loss
from .base import DISTILLER_REGISTRY, DistillBatch
from .pyramid import LevelMaps, PyramidDistiller

SCALINGS = ("channel", "sample", "batch", "none")


def scaling_options(scaling: str, scaling_grad: bool) -> dict[str, Any]:
    """The options of a loss for ``MODEL.DISTILL.SCALING`` and ``SCALING_GRAD``.

    Raises:
        ValueError: an unknown scaling.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"MODEL.DISTILL.SCALING is {scaling!r}; expected one of {SCALINGS}.")
    return {"scaling": None if scaling == "none" else scaling, "scaling_grad": scaling_grad}


@DISTILLER_REGISTRY.register()
class LpDistiller(PyramidDistiller):
    """The mean of |S - T| (l1) or (S - T)^2 (l2) of the scaled maps; see :func:`lp_loss`.

    LpDistiller(loss="l2", weight=4.0)
    """

    @configurable
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
        if loss not in ("l1", "l2"):
            raise ValueError(
                f"MODEL.DISTILL.LOSS is {loss!r}; LpDistiller expects one of ('l1', 'l2')."
            )
        self.power = int(loss[1])
        self.options = scaling_options(scaling, scaling_grad)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the keys of the losses."""
        distill = cfg.MODEL.DISTILL
        return {
            **super().from_config(cfg),
            "loss": distill.LOSS,
            "scaling": distill.SCALING,
            "scaling_grad": distill.SCALING_GRAD,
        }

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """l1 or l2 of the scaled maps of one level."""
        mask = maps.mask if maps.padded else None
        return lp_loss(maps.student, maps.teacher, p=self.power, mask=mask, **self.options)
