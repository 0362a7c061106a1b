"""The distiller of FBKD (Zhang & Ma, ICLR 2021, openreview.net/forum?id=uKhGRvM8QNH)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import nn
from torch.linalg import vector_norm

from ssim_kd.losses import (
    cell_means,
    channel_attention,
    norm_scales,
    reference_size,
    spatial_attention,
    valid_cells,
)
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PartsDistiller,
    build_adapters,
    check_number,
)

from .non_local import NonLocal

#: Weights of the paper for two-stage detectors.
WEIGHTS = {"feature": 7e-5, "channel": 4e-3, "spatial": 4e-3, "nonlocal": 7e-5}


@DISTILLER_REGISTRY.register()
class FBKDDistiller(PartsDistiller):
    """Attention-guided and non-local distillation: four norms a level, over the whole batch.

    With M = (G_s(S) + G_s(T)) / 2 (:func:`spatial_attention`), A, A' 1x1 and D 3x3 convolutions, B
    a linear layer and NL a :class:`NonLocal` block for each model:

        feature     || sqrt(M) (T - A(S)) ||
        channel     || mean_cells T - B(mean_cells S) ||
        spatial     || mean_channels T - D(mean_channels S) ||
        nonlocal    || NL_T(T) - A'(NL_S(S)) ||
    """

    adapts = False

    @configurable
    def __init__(
        self,
        *,
        name: str = "fbkd",
        temperature: float = 0.5,
        channel_attention: bool = False,
        part_weights: Mapping[str, float] = WEIGHTS,
        pool_strides: Sequence[int] = (8, 4, 2, 2, 2),
        inner_channels: Sequence[int] = (64, 64, 128, 128, 128),
        reference: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: of the attention, > 0.
            channel_attention: whether M is multiplied by (G_c(A(S)) + G_c(T)) / 2, G_c as
                :func:`channel_attention`.
            part_weights: of "feature", "channel", "spatial" and "nonlocal".
            pool_strides, inner_channels: of the blocks NL, one number a level.
            reference: see :func:`reference_size`; () for the norms as they are.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        key = "MODEL.DISTILL.FBKD"
        super().__init__(name=name, key=key, part_weights={**WEIGHTS, **part_weights}, **kwargs)
        self.temperature = check_number(f"{key}.TEMPERATURE", temperature, above=0)
        self.channel_attention = channel_attention
        self.pool_strides = _whole(f"{key}.POOL_STRIDES", pool_strides)
        self.inner_channels = _whole(f"{key}.INNER_CHANNELS", inner_channels)
        self.reference = reference_size(f"{key}.REFERENCE", reference)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the keys of FBKD."""
        fbkd = cfg.MODEL.DISTILL.FBKD
        weights = {
            "feature": fbkd.FEATURE_WEIGHT,
            "channel": fbkd.CHANNEL_WEIGHT,
            "spatial": fbkd.SPATIAL_WEIGHT,
            "nonlocal": fbkd.NONLOCAL_WEIGHT,
        }
        return {
            **super().from_config(cfg),
            "temperature": fbkd.TEMPERATURE,
            "channel_attention": fbkd.CHANNEL_ATTENTION,
            "part_weights": weights,
            "pool_strides": fbkd.POOL_STRIDES,
            "inner_channels": fbkd.INNER_CHANNELS,
            "reference": fbkd.REFERENCE,
        }

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make the modules of each level.

        Raises:
            ValueError: POOL_STRIDES or INNER_CHANNELS of another length than the levels.
        """
        for key in ("pool_strides", "inner_channels"):
            values = getattr(self, key)
            if len(values) != len(self.levels):
                raise ValueError(
                    f"MODEL.DISTILL.FBKD.{key.upper()} has {len(values)} numbers ({values}) for "
                    f"the {len(self.levels)} levels {self.levels}; expected one a level."
                )
        self.feature_maps = build_adapters("always", student, teacher)
        self.channel_maps, self.spatial_maps = nn.ModuleDict(), nn.ModuleDict()
        self.student_nonlocal, self.teacher_nonlocal = nn.ModuleDict(), nn.ModuleDict()
        self.nonlocal_maps = nn.ModuleDict()
        for level, inner, stride in zip(
            self.levels, self.inner_channels, self.pool_strides, strict=True
        ):
            ours, theirs = student[level].channels, teacher[level].channels
            self.channel_maps[level] = nn.Linear(ours, theirs)
            self.spatial_maps[level] = nn.Conv2d(1, 1, 3, padding=1)
            self.student_nonlocal[level] = NonLocal(ours, inner, stride)
            self.teacher_nonlocal[level] = NonLocal(theirs, inner, stride)
            # Of cells, of which it is a 1x1 convolution.
            self.nonlocal_maps[level] = nn.Linear(ours, theirs)

    def level_parts(self, maps: LevelMaps, batch: DistillBatch) -> dict[str, torch.Tensor]:
        """See :class:`FBKDDistiller`; all in float32."""
        with torch.autocast(maps.student.device.type, enabled=False):
            return self._parts(maps._replace(student=maps.student.float()), maps.teacher.float())

    def _parts(self, maps: LevelMaps, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
        level, student = maps.level, maps.student
        mask = maps.mask if maps.padded else None
        adapted = self.feature_maps[level](student)
        attention = self._attention(student, adapted, teacher, mask)
        difference = (teacher - adapted) * attention.sqrt()
        channel = cell_means(teacher, mask) - self.channel_maps[level](cell_means(student, mask))
        spatial = teacher.mean(dim=1, keepdim=True) - self.spatial_maps[level](
            student.mean(dim=1, keepdim=True)
        )
        relation = self.teacher_nonlocal[level](teacher, mask) - self.nonlocal_maps[level](
            self.student_nonlocal[level](student, mask)
        )
        images, channels, cells = norm_scales(
            self.reference, teacher, maps.mask, self.strides[level]
        )
        return {
            "feature": vector_norm(valid_cells(difference, mask)) * images * channels * cells,
            "channel": vector_norm(channel) * images * channels,
            "spatial": vector_norm(valid_cells(spatial, mask)) * images * cells,
            "nonlocal": vector_norm(relation) * images * channels * cells,
        }

    @torch.no_grad()
    def _attention(
        self,
        student: torch.Tensor,
        adapted: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """M, (N, 1 or C, H, W)."""
        options: dict[str, Any] = {"temperature": self.temperature, "mask": mask}
        found = (spatial_attention(student, **options) + spatial_attention(teacher, **options)) / 2
        if self.channel_attention:
            # Of the student's own map, if it has as many channels.
            ours = student if student.shape[1] == teacher.shape[1] else adapted
            pair = channel_attention(ours, **options) + channel_attention(teacher, **options)
            found = found * pair / 2
        return found


def _whole(key: str, values: Sequence[int]) -> list[int]:
    found = list(values)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in found):
        raise ValueError(f"{key} is {found}; expected whole numbers > 0, one a level.")
    return found
