"""The distiller of DRKD (Ni et al., IJCAI 2023, arXiv 2302.05637)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import nn
from torch.linalg import vector_norm

from ssim_kd.losses import norm_scales, reference_size, roi_crops
from ssim_kd.modeling import DISTILLER_REGISTRY, DistillBatch, LevelMaps, PartsDistiller

from .modules import BoxRelation, GraphReasoning

#: Weights of the paper for Faster R-CNN.
WEIGHTS = {"pixel": 1e-3, "relation": 4e-3, "instance": 2.4e-3}
#: Bins of a box, a side.
CROP_SIZE = 3
_KEY = "MODEL.DISTILL.DRKD"


@DISTILLER_REGISTRY.register()
class DRKDDistiller(PartsDistiller):
    """Relations between all cells and between the boxes of an image: norms of a level.

    With :class:`GraphReasoning` P and :class:`BoxRelation` Z for each model, 1x1 convolutions A,
    and the crops s, t of 3 x 3 bins of the ground-truth boxes of an image (:func:`roi_crops`):

        pixel       || P_T(T) - A(P_S(S)) ||                          over the batch
        relation    sum over images of || Z_T(t) - A'(Z_S(s)) ||      on the first levels
        instance    sum over images of || t - A''(s) ||               on the first levels
    """

    adapts = False

    @configurable
    def __init__(
        self,
        *,
        name: str = "drkd",
        part_weights: Mapping[str, float] = WEIGHTS,
        nodes: Sequence[int] = (64, 64, 256, 256, 256),
        box_levels: int = 2,
        reference: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            part_weights: of "pixel", "relation" and "instance".
            nodes: of P, one number a level.
            box_levels: on how many levels, from the first, boxes are compared.
            reference: see :func:`reference_size`; () for the norms as they are.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, key=_KEY, part_weights={**WEIGHTS, **part_weights}, **kwargs)
        for key, values, least in (("NODES", list(nodes), 1), ("BOX_LEVELS", [box_levels], 0)):
            if any(not isinstance(v, int) or isinstance(v, bool) or v < least for v in values):
                raise ValueError(f"{_KEY}.{key}: {values}; expected whole numbers >= {least}.")
        self.nodes, self.box_levels = list(nodes), box_levels
        self.reference = reference_size(f"{_KEY}.REFERENCE", reference)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the keys of DRKD."""
        drkd = cfg.MODEL.DISTILL.DRKD
        return {
            **super().from_config(cfg),
            "part_weights": {
                "pixel": drkd.PIXEL_WEIGHT,
                "relation": drkd.RELATION_WEIGHT,
                "instance": drkd.INSTANCE_WEIGHT,
            },
            "nodes": drkd.NODES,
            "box_levels": drkd.BOX_LEVELS,
            "reference": drkd.REFERENCE,
        }

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make the modules of each level.

        Raises:
            ValueError: NODES of another length than the levels, or BOX_LEVELS beyond them.
        """
        if len(self.nodes) != len(self.levels):
            raise ValueError(
                f"{_KEY}.NODES has {len(self.nodes)} numbers ({self.nodes}) for the "
                f"{len(self.levels)} levels {self.levels}; expected one a level."
            )
        if self.box_levels > len(self.levels):
            raise ValueError(
                f"{_KEY}.BOX_LEVELS is {self.box_levels}; expected at most the "
                f"{len(self.levels)} levels {self.levels}."
            )
        self.student_graphs, self.teacher_graphs = nn.ModuleDict(), nn.ModuleDict()
        self.student_relations, self.teacher_relations = nn.ModuleDict(), nn.ModuleDict()
        self.pixel_maps = nn.ModuleDict()
        self.relation_maps, self.instance_maps = nn.ModuleDict(), nn.ModuleDict()
        for level, nodes in zip(self.levels, self.nodes, strict=True):
            ours, theirs = int(student[level].channels), int(teacher[level].channels)
            self.student_graphs[level] = GraphReasoning(ours, nodes)
            self.teacher_graphs[level] = GraphReasoning(theirs, nodes)
            # Of cells, of which it is a 1x1 convolution.
            self.pixel_maps[level] = nn.Linear(ours, theirs)
        for level in self.levels[: self.box_levels]:
            ours, theirs = int(student[level].channels), int(teacher[level].channels)
            self.student_relations[level] = BoxRelation(ours * CROP_SIZE**2)
            self.teacher_relations[level] = BoxRelation(theirs * CROP_SIZE**2)
            self.relation_maps[level] = nn.Conv2d(ours, theirs, 1)
            self.instance_maps[level] = nn.Conv2d(ours, theirs, 1)

    def level_parts(self, maps: LevelMaps, batch: DistillBatch) -> dict[str, torch.Tensor]:
        """See :class:`DRKDDistiller`; all in float32.

        Raises:
            ValueError: training images without ground truth.
        """
        boxes = [x.gt_boxes.tensor for x in batch.ground_truth(type(self).__name__)]
        with torch.autocast(maps.student.device.type, enabled=False):
            return self._parts(maps, maps.student.float(), maps.teacher.float(), boxes)

    def _parts(
        self,
        maps: LevelMaps,
        student: torch.Tensor,
        teacher: torch.Tensor,
        boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        level = maps.level
        mask = maps.mask if maps.padded else None
        pixel = self.teacher_graphs[level](teacher, mask) - self.pixel_maps[level](
            self.student_graphs[level](student, mask)
        )
        images, channels, cells = norm_scales(
            self.reference, teacher, maps.mask, self.strides[level]
        )
        parts = {"pixel": vector_norm(pixel) * images * channels * cells}
        if level not in self.student_relations:
            return parts
        # Of the teacher's maps, which are brought to the student's stride.
        ours = roi_crops(student, boxes, self.strides[level], CROP_SIZE)
        theirs = roi_crops(teacher, boxes, self.strides[level], CROP_SIZE)
        relations, instances = [], []
        for s, t in zip(ours, theirs, strict=True):
            related = self.relation_maps[level](self.student_relations[level](s))
            relations.append(vector_norm(self.teacher_relations[level](t) - related))
            instances.append(vector_norm(t - self.instance_maps[level](s)))
        return {
            **parts,
            # Sums over the images.
            "relation": torch.stack(relations).sum() * images**2 * channels,
            "instance": torch.stack(instances).sum() * images**2 * channels,
        }
