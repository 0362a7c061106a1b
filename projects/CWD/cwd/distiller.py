"""The distiller of CWD (Shu et al., ICCV 2021, arXiv 2011.13256)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable

from ssim_kd.losses import masked_log_softmax
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PyramidDistiller,
    check_number,
)


def channel_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, mask: torch.Tensor
) -> torch.Tensor:
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) over the cells, the mean over the channels.

    Args:
        student, teacher: (N, C, H, W).
        temperature: tau > 0.
        mask: (N, H, W) bool, the cells that count.

    Returns:
        scalar, the mean over the samples, >= 0.
    """
    log_s, log_t = (masked_log_softmax(x / temperature, mask) for x in (student, teacher))
    # In the padding both are 0.
    share = log_t.exp().masked_fill(~mask[:, None], 0.0)
    divergence = (share * (log_t - log_s)).sum(dim=(2, 3))
    return temperature**2 * divergence.mean()


@DISTILLER_REGISTRY.register()
class CWDDistiller(PyramidDistiller):
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) of each channel over its cells."""

    @configurable
    def __init__(self, *, name: str = "cwd", temperature: float = 1.0, **kwargs: Any) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: tau > 0.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a temperature that is no number > 0.
        """
        super().__init__(name=name, **kwargs)
        key = "MODEL.DISTILL.CWD.TEMPERATURE"
        self.temperature = check_number(key, temperature, above=0)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the temperature."""
        return {**super().from_config(cfg), "temperature": cfg.MODEL.DISTILL.CWD.TEMPERATURE}

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """The loss of one level."""
        # The sums over the cells need float32.
        with torch.autocast(maps.student.device.type, enabled=False):
            return channel_kl(maps.student, maps.teacher, self.temperature, maps.mask)
