"""The distiller of CWD (Shu et al., ICCV 2021, arXiv 2011.13256)."""

from typing import Any

import torch
from detectron2.config import configurable

from ssim_kd.losses import masked_log_softmax
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PyramidDistiller,
    check_number,
)


def channel_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) over the cells, the mean over the channels.

    Args:
        student, teacher: (N, C, H, W).
        temperature: tau > 0.
        mask: (N, H, W) bool, the cells that count; None: all.

    Returns:
        scalar, the mean over the samples, >= 0.
    """
    log_s, log_t = (masked_log_softmax(x / temperature, mask) for x in (student, teacher))
    # Both are 0 in the padding, and so is their difference.
    divergence = (log_t.exp() * (log_t - log_s)).sum(dim=(2, 3))
    return temperature**2 * divergence.mean()


@DISTILLER_REGISTRY.register()
class CWDDistiller(PyramidDistiller):
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) of each channel over its cells."""

    keys = {"temperature": "CWD.TEMPERATURE"}
    defaults = {"weight": 10.0, "levels": ("p2", "p3", "p4", "p5", "p6")}
    dense_defaults = {"weight": 5.0, "levels": ("p3", "p4", "p5", "p6")}

    @configurable
    def __init__(self, *, name: str = "cwd", temperature: float = 1.0, **kwargs: Any) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: tau > 0.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a temperature that is not a number > 0.
        """
        super().__init__(name=name, **kwargs)
        self.temperature = check_number("temperature", temperature, above=0)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> torch.Tensor:
        """The loss of one level."""
        return channel_kl(maps.student, maps.teacher, self.temperature, maps.mask)
