"""The distiller of FBKD (Zhang & Ma, ICLR 2021, openreview.net/forum?id=uKhGRvM8QNH)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
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
    PyramidDistiller,
    check_number,
    check_numbers,
    part_keys,
)

from .non_local import NonLocal

#: Of the non-local blocks by level.
POOL_STRIDES, INNER_CHANNELS = (8, 4, 2, 2, 2), (64, 64, 128, 128, 128)


@DISTILLER_REGISTRY.register()
class FBKDDistiller(PyramidDistiller):
    """Attention-guided and non-local distillation: four norms a level, over the whole batch.

    With M = (G_s(S) + G_s(T)) / 2 (:func:`spatial_attention`), A, A' 1x1 and D 3x3 convolutions, B
    a linear layer and NL a :class:`NonLocal` block for each model:

        feature     || sqrt(M) (T - A(S)) ||
        channel     || mean_cells T - B(mean_cells S) ||
        spatial     || mean_channels T - D(mean_channels S) ||
        nonlocal    || NL_T(T) - A'(NL_S(S)) ||
    """

    keys = {
        "temperature": "FBKD.TEMPERATURE",
        "channel_attention": "FBKD.CHANNEL_ATTENTION",
        "pool_strides": "FBKD.POOL_STRIDES",
        "inner_channels": "FBKD.INNER_CHANNELS",
        "reference": "FBKD.REFERENCE",
        **part_keys("FBKD", "feature", "channel", "spatial", "nonlocal"),
    }
    defaults = {
        "levels": ("p2", "p3", "p4", "p5", "p6"),
        "temperature": 0.5,
        "channel_attention": False,
        "part_weights": {"feature": 7e-5, "channel": 4e-3, "spatial": 4e-3, "nonlocal": 7e-5},
    }
    dense_defaults = {
        "levels": ("p3", "p4", "p5", "p6", "p7"),
        "temperature": 0.1,
        "channel_attention": True,
        "part_weights": {
            "feature": 4.2e-4,
            "channel": 2.4e-2,
            "spatial": 2.4e-2,
            "nonlocal": 4.2e-4,
        },
    }
    adapts = False

    @configurable
    def __init__(
        self,
        *,
        name: str = "fbkd",
        temperature: float | None = None,
        channel_attention: bool | None = None,
        pool_strides: Sequence[int] = (),
        inner_channels: Sequence[int] = (),
        reference: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            temperature: of the attention, > 0; None for the method's own.
            channel_attention: whether M is multiplied by (G_c(A(S)) + G_c(T)) / 2, G_c as
                :func:`channel_attention`; None for the method's own.
            pool_strides, inner_channels: of the blocks NL, one number a level; () for the first of
                8, 4, 2, 2, 2 and of 64, 64, 128, 128, 128.
            reference: see :func:`reference_size`; () for the norms as they are.
            kwargs: of :class:`PyramidDistiller`; part_weights of "feature", "channel", "spatial"
                and "nonlocal".

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        self.temperature = check_number("temperature", temperature, above=0, optional=True)
        self.channel_attention: Any = channel_attention
        self.pool_strides = check_numbers("pool_strides", pool_strides, least=1)
        self.inner_channels = check_numbers("inner_channels", inner_channels, least=1)
        self.reference = reference_size("reference", reference)

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make the modules of each level.

        Raises:
            ValueError: pool_strides or inner_channels of another length than the levels.
        """
        strides = self.one_a_level("pool_strides", POOL_STRIDES, self.pool_strides)
        inner_channels = self.one_a_level("inner_channels", INNER_CHANNELS, self.inner_channels)
        self.feature_maps = nn.ModuleDict()
        self.channel_maps, self.spatial_maps = nn.ModuleDict(), nn.ModuleDict()
        self.student_nonlocal, self.teacher_nonlocal = nn.ModuleDict(), nn.ModuleDict()
        self.nonlocal_maps = nn.ModuleDict()
        for level, inner, stride in zip(self.levels, inner_channels, strides, strict=True):
            ours, theirs = int(student[level].channels), int(teacher[level].channels)
            self.feature_maps[level] = nn.Conv2d(ours, theirs, 1)
            self.channel_maps[level] = nn.Linear(ours, theirs)
            self.spatial_maps[level] = nn.Conv2d(1, 1, 3, padding=1)
            self.student_nonlocal[level] = NonLocal(ours, inner, stride)
            self.teacher_nonlocal[level] = NonLocal(theirs, inner, stride)
            # Of cells, of which it is a 1x1 convolution.
            self.nonlocal_maps[level] = nn.Linear(ours, theirs)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> dict[str, torch.Tensor]:
        """See :class:`FBKDDistiller`."""
        level, student, teacher, mask = maps
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
        images, channels, cells = norm_scales(self.reference, teacher, mask, self.strides[level])
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
