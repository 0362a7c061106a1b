"""The distiller of FGD (Yang et al., CVPR 2022, arXiv 2111.11837)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import nn

from ssim_kd.losses import (
    background_weights,
    channel_attention,
    foreground_weights,
    masked_softmax,
    masked_sum,
    reference_size,
    spatial_attention,
)
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PartsDistiller,
    check_number,
)

#: Weights of the paper for Faster R-CNN.
WEIGHTS = {"fg": 5e-5, "bg": 2.5e-5, "attention": 5e-5, "global": 5e-7}


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
class FGDDistiller(PartsDistiller):
    """Foreground and background by themselves, weighted by the teacher's attention, and relations.

    With A_s, A_c the spatial and channel attention, sums over all elements, N images:

        fg, bg      sum M A_s A_c (T - S)^2 / N, M by :func:`foreground_weights`, background_weights
        attention   (sum |A_s(S) - A_s(T)| + sum |A_c(S) - A_c(T)|) / N
        global      sum (GC_T(T) - GC_S(S))^2 / N, with a :class:`GlobalContext` for each model
    """

    @configurable
    def __init__(
        self,
        *,
        name: str = "fgd",
        temperature: float = 0.5,
        part_weights: Mapping[str, float] = WEIGHTS,
        reference: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: of the attention, > 0.
            part_weights: of "fg", "bg", "attention" and "global".
            reference: see :func:`reference_size`; () for the sums as they are.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        key = "MODEL.DISTILL.FGD"
        super().__init__(name=name, key=key, part_weights={**WEIGHTS, **part_weights}, **kwargs)
        self.temperature = check_number(f"{key}.TEMPERATURE", temperature, above=0)
        self.reference = reference_size(f"{key}.REFERENCE", reference)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the keys of FGD."""
        fgd = cfg.MODEL.DISTILL.FGD
        weights = {
            "fg": fgd.FG_WEIGHT,
            "bg": fgd.BG_WEIGHT,
            "attention": fgd.ATTENTION_WEIGHT,
            "global": fgd.GLOBAL_WEIGHT,
        }
        return {
            **super().from_config(cfg),
            "temperature": fgd.TEMPERATURE,
            "part_weights": weights,
            "reference": fgd.REFERENCE,
        }

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make the context blocks of each level."""
        self.student_context = nn.ModuleDict()
        self.teacher_context = nn.ModuleDict()
        for level, shape in teacher.items():
            self.student_context[level] = GlobalContext(shape.channels)
            self.teacher_context[level] = GlobalContext(shape.channels)

    def level_parts(self, maps: LevelMaps, batch: DistillBatch) -> dict[str, torch.Tensor]:
        """See :class:`FGDDistiller`.

        Raises:
            ValueError: training images without ground truth.
        """
        boxes = [x.gt_boxes.tensor for x in batch.ground_truth(type(self).__name__)]
        # Sums over the cells, and softmax: float32.
        with torch.autocast(maps.student.device.type, enabled=False):
            return self._parts(maps, boxes)

    def _parts(self, maps: LevelMaps, boxes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        student, teacher = maps.student.float(), maps.teacher.float()
        mask = maps.mask if maps.padded else None
        options: dict[str, Any] = {"temperature": self.temperature, "mask": mask}
        spatial_s, spatial_t = (spatial_attention(x, **options) for x in (student, teacher))
        channel_s, channel_t = (channel_attention(x, **options) for x in (student, teacher))

        height, width = student.shape[-2:]
        foreground = foreground_weights(boxes, height, width, self.strides[maps.level], mask=mask)
        background = background_weights(foreground, mask)
        # In the padding the attention is 0; the difference need not be finite there.
        difference = student - teacher
        if mask is not None:
            difference = difference.masked_fill(~mask[:, None], 0.0)
        error = (difference.square() * channel_t).sum(dim=1) * spatial_t[:, 0]

        relation = self.student_context[maps.level](student, mask) - self.teacher_context[
            maps.level
        ](teacher, mask)
        channels, cells = self._scales(maps)
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

    def _scales(self, maps: LevelMaps) -> tuple[float, torch.Tensor | float]:
        """What sums over channels, and over the cells of an image, are multiplied by."""
        if self.reference is None:
            return 1.0, 1.0
        channels = self.reference.channels / maps.student.shape[1]
        cells = self.reference.cells(self.strides[maps.level])
        return channels, cells / (maps.mask.sum() / len(maps.mask))
