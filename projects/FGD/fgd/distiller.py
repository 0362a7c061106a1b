"""The distiller of FGD (Yang et al., CVPR 2022, arXiv 2111.11837)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import nn

from ssim_kd.losses import (
    background_weights,
    channel_attention,
    foreground_weights,
    masked_softmax,
    masked_sum,
    reference_size,
    size_scales,
    spatial_attention,
)
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PyramidDistiller,
    check_number,
    part_keys,
)


class GlobalContext(nn.Module):
    """x + bottleneck(sum over the cells of softmax(1x1(x)) x), the block of GCNet.

    GC(x)_p = x_p + W2 ReLU(LN(W1 sum_q softmax_q(w x_q) x_q)); W2 begins as 0.
    """

    def __init__(self, channels: int, ratio: int = 2) -> None:
        """
        Args:
            channels: C of the maps.
            ratio: of C to the inner width.
        """
        super().__init__()
        inner = max(channels // ratio, 1)
        # A bias would not matter to the softmax.
        self.attend = nn.Conv2d(channels, 1, 1, bias=False)
        last = nn.Conv2d(inner, channels, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(), last
        )
        nn.init.kaiming_normal_(self.attend.weight, mode="fan_in", nonlinearity="relu")
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
            mask: (N, H, W) bool, the cells that are attended to; None: all.

        Returns:
            (N, C, H, W).
        """
        attention = masked_softmax(self.attend(x), mask)
        return x + self.transform((x * attention).sum(dim=(2, 3), keepdim=True))


@DISTILLER_REGISTRY.register()
class FGDDistiller(PyramidDistiller):
    """Foreground and background by themselves, weighted by the teacher's attention, and relations.

    With A_s, A_c the spatial and channel attention, sums over all elements, N images:

        fg, bg      sum M A_s A_c (T - S)^2 / N, M by :func:`foreground_weights`, background_weights
        attention   (sum |A_s(S) - A_s(T)| + sum |A_c(S) - A_c(T)|) / N
        global      sum (GC_T(T) - GC_S(S))^2 / N, with a :class:`GlobalContext` for each model
    """

    keys = {
        "temperature": "FGD.TEMPERATURE",
        "reference": "FGD.REFERENCE",
        **part_keys("FGD", "fg", "bg", "attention", "global"),
    }
    defaults = {
        "levels": ("p2", "p3", "p4", "p5"),
        "part_weights": {"fg": 5e-5, "bg": 2.5e-5, "attention": 5e-5, "global": 5e-7},
    }
    dense_defaults = {
        "levels": ("p3", "p4", "p5", "p6", "p7"),
        "part_weights": {"fg": 1e-3, "bg": 5e-4, "attention": 5e-4, "global": 5e-6},
    }

    @configurable
    def __init__(
        self,
        *,
        name: str = "fgd",
        temperature: float = 0.5,
        reference: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: of the attention, > 0.
            reference: see :func:`reference_size`; () for the sums as they are.
            kwargs: of :class:`PyramidDistiller`; part_weights of "fg", "bg", "attention" and
                "global".

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        self.temperature = check_number("temperature", temperature, above=0)
        self.reference = reference_size("reference", reference)

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make the context blocks of each level."""
        self.student_context = nn.ModuleDict()
        self.teacher_context = nn.ModuleDict()
        for level, shape in teacher.items():
            self.student_context[level] = GlobalContext(shape.channels)
            self.teacher_context[level] = GlobalContext(shape.channels)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> dict[str, torch.Tensor]:
        """See :class:`FGDDistiller`.

        Raises:
            ValueError: training images without ground truth.
        """
        level, student, teacher, mask = maps
        boxes = batch.boxes(type(self).__name__)
        options: dict[str, Any] = {"temperature": self.temperature, "mask": mask}
        spatial_s, spatial_t = (spatial_attention(x, **options) for x in (student, teacher))
        channel_s, channel_t = (channel_attention(x, **options) for x in (student, teacher))

        height, width = student.shape[-2:]
        foreground = foreground_weights(boxes, height, width, self.strides[level], mask=mask)
        background = background_weights(foreground, mask)
        # In the padding the attention is 0; the difference need not be finite there.
        difference = student - teacher
        if mask is not None:
            difference = difference.masked_fill(~mask[:, None], 0.0)
        error = (difference.square() * channel_t).sum(dim=1) * spatial_t[:, 0]

        ours, theirs = self.student_context[level], self.teacher_context[level]
        relation = ours(student, mask) - theirs(teacher, mask)
        _, channels, cells = size_scales(self.reference, teacher, mask, self.strides[level])
        n = len(student)
        return {
            "fg": channels * (foreground * error).sum() / n,
            "bg": channels * (background * error).sum() / n,
            "attention": (
                cells * (spatial_s - spatial_t).abs().sum()
                + channels * (channel_s - channel_t).abs().sum()
            )
            / n,
            "global": channels * cells * masked_sum(relation.square(), mask) / n,
        }
