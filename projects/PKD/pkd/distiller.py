"""The distiller of PKD (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable

from ssim_kd.losses import channel_moments
from ssim_kd.modeling import DISTILLER_REGISTRY, DistillBatch, LevelMaps, PyramidDistiller


def standardize(x: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """Bring each channel to mean 0 and standard deviation 1 over the batch and its cells.

    Args:
        x: (N, C, H, W), float32.
        mask: (N, H, W) bool, the cells that count.
        eps: added to the standard deviation.

    Returns:
        (N, C, H, W), 0 in the cells that do not count and in channels that are constant.
    """
    mean, std = channel_moments(x, mask)
    return torch.where(mask[:, None], x - mean, 0.0) / (std + eps)


@DISTILLER_REGISTRY.register()
class PKDDistiller(PyramidDistiller):
    """Half the mean squared error of standardised maps: 1 - the Pearson correlation.

    The moments are those of the batch of one process: under DDP the loss is not the mean over the
    samples that a single process would take.
    """

    @configurable
    def __init__(self, *, name: str = "pkd", eps: float = 1e-6, **kwargs: Any) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            eps: see :func:`standardize`.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: ``eps`` is not positive.
        """
        super().__init__(name=name, **kwargs)
        if not eps > 0:
            raise ValueError(f"MODEL.DISTILL.PKD.EPS is {eps}; expected a positive number.")
        self.eps = eps

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the key of PKD."""
        return {**super().from_config(cfg), "eps": cfg.MODEL.DISTILL.PKD.EPS}

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """The loss of one level."""
        # In half precision the squares of a channel's deviations lose their digits.
        with torch.autocast(maps.student.device.type, enabled=False):
            student, teacher = maps.student.float(), maps.teacher.float()
            difference = standardize(student, maps.mask, self.eps) - standardize(
                teacher, maps.mask, self.eps
            )
            count = maps.mask.sum().clamp(min=1) * student.shape[1]
            return difference.square().sum() / count / 2
