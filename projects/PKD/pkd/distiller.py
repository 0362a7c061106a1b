"""The distiller of PKD (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable

from ssim_kd.modeling import DISTILLER_REGISTRY, DistillBatch, LevelMaps, PyramidDistiller


def standardize(x: torch.Tensor, cells: torch.Tensor, eps: float) -> torch.Tensor:
    """Bring each channel to mean 0 and standard deviation 1 over the batch and its cells.

    Args:
        x: (N, C, H, W), float32.
        cells: (N, 1, H, W) of 0 and 1: those that count.
        eps: added to the standard deviation.

    Returns:
        (N, C, H, W), 0 in the cells that do not count and in channels that are constant.
    """
    count = cells.sum()
    mean = (x * cells).sum(dim=(0, 2, 3), keepdim=True) / count.clamp(min=1)
    deviation = (x - mean) * cells
    variance = deviation.square().sum(dim=(0, 2, 3), keepdim=True) / (count - 1).clamp(min=1)
    # The root has no finite gradient at 0: constant channels, and maps of a single cell.
    constant = variance == 0
    std = torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())
    return deviation / (std + eps)


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
            cells = maps.mask[:, None].float()
            difference = standardize(student, cells, self.eps) - standardize(
                teacher, cells, self.eps
            )
            count = cells.sum().clamp(min=1) * student.shape[1]
            return difference.square().sum() / count / 2
