"""The distiller of DRKD (Ni et al., IJCAI 2023, arXiv 2302.05637)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import nn
from torch.linalg import vector_norm

from ssim_kd.losses import norm_scales, reference_size, roi_crops
from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    LevelMaps,
    PyramidDistiller,
    check_number,
    check_numbers,
    part_keys,
)

from .modules import BoxRelation, GraphReasoning

#: Bins of a box, a side.
CROP_SIZE = 3
#: Of the graphs by level.
NODES = (64, 64, 256, 256, 256)


@DISTILLER_REGISTRY.register()
class DRKDDistiller(PyramidDistiller):
    """Relations between all cells and between the boxes of an image: norms of a level.

    With :class:`GraphReasoning` P and :class:`BoxRelation` Z for each model, 1x1 convolutions A,
    and the crops s, t of 3 x 3 bins of the ground-truth boxes of an image (:func:`roi_crops`):

        pixel       || P_T(T) - A(P_S(S)) ||                          over the batch
        relation    sum over images of || Z_T(t) - A'(Z_S(s)) ||      on the first levels
        instance    sum over images of || t - A''(s) ||               on the first levels
    """

    keys = {
        "nodes": "DRKD.NODES",
        "box_levels": "DRKD.BOX_LEVELS",
        "reference": "DRKD.REFERENCE",
        **part_keys("DRKD", "pixel", "relation", "instance"),
    }
    defaults = {
        "levels": ("p2", "p3", "p4", "p5", "p6"),
        "part_weights": {"pixel": 1e-3, "relation": 4e-3, "instance": 2.4e-3},
    }
    dense_defaults = {
        "levels": ("p3", "p4", "p5", "p6", "p7"),
        "part_weights": {"pixel": 4e-3, "relation": 5e-3, "instance": 6e-3},
    }
    adapts = False

    @configurable
    def __init__(
        self,
        *,
        name: str = "drkd",
        nodes: Sequence[int] = (),
        box_levels: int = 2,
        reference: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            nodes: of P, one number a level; () for the first of 64, 64, 256, 256, 256.
            box_levels: on how many levels, from the first, boxes are compared.
            reference: see :func:`reference_size`; () for the norms as they are.
            kwargs: of :class:`PyramidDistiller`; part_weights of "pixel", "relation" and
                "instance".

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        self.nodes = check_numbers("nodes", nodes, least=1)
        self.box_levels = check_number("box_levels", box_levels, least=0, whole=True)
        self.reference = reference_size("reference", reference)

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make the modules of each level.

        Raises:
            ValueError: nodes of another length than the levels, or box_levels beyond them.
        """
        check_number("box_levels", self.box_levels, most=len(self.levels), whole=True)
        nodes_of = self.one_a_level("nodes", NODES, self.nodes)
        self.student_graphs, self.teacher_graphs = nn.ModuleDict(), nn.ModuleDict()
        self.student_relations, self.teacher_relations = nn.ModuleDict(), nn.ModuleDict()
        self.pixel_maps = nn.ModuleDict()
        self.relation_maps, self.instance_maps = nn.ModuleDict(), nn.ModuleDict()
        for level, nodes in zip(self.levels, nodes_of, strict=True):
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

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> dict[str, torch.Tensor]:
        """See :class:`DRKDDistiller`.

        Raises:
            ValueError: training images without ground truth.
        """
        level, student, teacher, mask = maps
        boxes = batch.boxes(type(self).__name__)
        pixel = self.teacher_graphs[level](teacher, mask) - self.pixel_maps[level](
            self.student_graphs[level](student, mask)
        )
        images, channels, cells = norm_scales(self.reference, teacher, mask, self.strides[level])
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
