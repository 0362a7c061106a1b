"""The distiller of ICD (Kang et al., NeurIPS 2021, arXiv 2110.12724)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn
from torch.nn import functional as F

from ssim_kd.modeling import (
    DISTILLER_REGISTRY,
    DistillBatch,
    FrozenTeacher,
    LevelMaps,
    PyramidDistiller,
    check_number,
)

from .modules import (
    Decoder,
    Queries,
    QueryEncoder,
    cell_positions,
    draw_queries,
    mlp,
    sine_encoding,
    xavier,
)

#: Weights of RetinaNet; Faster R-CNN has a "value" of 3.
WEIGHTS = {"value": 8.0, "real": 1.0, "sides": 1.0}
_KEY = "MODEL.DISTILL.ICD"


@DISTILLER_REGISTRY.register()
class ICDDistiller(PyramidDistiller):
    """What the teacher's maps know of each object, found by a decoder that is asked for it.

    A decoder over all cells of the teacher is asked for boxes, real and fake, and learns to tell
    which are real and where their sides are (the auxiliary task). Where it looks for a real box,
    the student's cells are brought to the teacher's:

        value   mean over images, heads h and channels of sum_p m_p (V_S - V_T)^2 / sum_p m_p,
                m_p the sum over the real boxes of the attention to cell p, V a linear layer of the
                cells and a LayerNorm of each head
        real    binary cross entropy of the boxes, real or fake
        sides   L1 of the distances to the four sides, by the box's width or height, of real boxes

    "value" trains the student and its linear layer, "real" and "sides" train the decoder; neither
    reaches the detectors' weights otherwise.
    """

    adapts = False

    @configurable
    def __init__(
        self,
        *,
        name: str = "icd",
        num_classes: int = 0,
        part_weights: Mapping[str, float] = WEIGHTS,
        dim: int = 256,
        heads: int = 8,
        hidden_dim: int = 1024,
        fake_ratio: float = 5.0,
        max_boxes: int = 300,
        fake_size: Sequence[float] = (0.2, 0.2),
        jitter: float = 0.3,
        detach_iters: int = 1000,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        clip_norm: float = 0.01,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            num_classes: of the ground truth; 0: as many as the student has.
            part_weights: of "value", "real" and "sides".
            dim, heads, hidden_dim: of the decoder.
            fake_ratio, max_boxes, fake_size, jitter: see :func:`draw_queries`.
            detach_iters: iterations in which the student does not learn of it.
            lr, weight_decay, clip_norm: of the AdamW of its own modules.
            kwargs: of :class:`PyramidDistiller`.

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        if self.level_weights:
            raise ValueError(
                f"MODEL.DISTILL.LEVEL_WEIGHTS is {self.level_weights}; expected [] with ICD, which "
                "takes all levels as one."
            )
        self.scalar_weights = {
            part: check_number(f"{_KEY}.{part.upper()}_WEIGHT", weight, least=0)
            for part, weight in {**WEIGHTS, **part_weights}.items()
        }
        for key, value, least in (
            ("DIM", dim, 4),
            ("HEADS", heads, 1),
            ("HIDDEN_DIM", hidden_dim, 1),
            ("MAX_BOXES", max_boxes, 1),
            ("DETACH_ITERS", detach_iters, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{_KEY}.{key} is {value!r}; expected a whole number >= {least}.")
        if dim % heads or dim % 4:
            raise ValueError(f"{_KEY}.DIM is {dim}; expected a multiple of 4 and HEADS ({heads}).")
        if len(fake_size) != 2:
            raise ValueError(f"{_KEY}.FAKE_SIZE is {fake_size}; expected a mean and a deviation.")
        mean, deviation = (check_number(f"{_KEY}.FAKE_SIZE", v, least=0) for v in fake_size)
        if not 0 <= check_number(f"{_KEY}.JITTER", jitter, least=0) <= 0.5:
            raise ValueError(f"{_KEY}.JITTER is {jitter}; expected a number from 0 to 0.5.")
        self.num_classes = num_classes
        self.dim, self.heads, self.hidden_dim = dim, heads, hidden_dim
        self.drawing: dict[str, Any] = {
            "fake_ratio": check_number(f"{_KEY}.FAKE_RATIO", fake_ratio, least=0),
            "max_boxes": max_boxes,
            "fake_size": (mean, deviation),
            "jitter": jitter,
        }
        self.detach_iters = detach_iters
        self.lr = check_number(f"{_KEY}.LR", lr, least=0)
        self.weight_decay = check_number(f"{_KEY}.WEIGHT_DECAY", weight_decay, least=0)
        self.clip_norm = check_number(f"{_KEY}.CLIP_NORM", clip_norm, above=0)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What :class:`PyramidDistiller` takes, and the keys of ICD."""
        options = {key.lower(): value for key, value in cfg.MODEL.DISTILL.ICD.items()}
        weights = {part: options.pop(f"{part}_weight") for part in WEIGHTS}
        return {**super().from_config(cfg), "part_weights": weights, **options}

    def bind(self, student: Any, teacher: FrozenTeacher) -> None:
        """See :meth:`PyramidDistiller.bind`; finds the number of classes.

        Raises:
            ValueError: a student without classes.
        """
        heads = getattr(student, "roi_heads", student)
        self.num_classes = self.num_classes or getattr(heads, "num_classes", 0)
        if not self.num_classes:
            raise ValueError(
                f"ICDDistiller needs the number of classes, but {type(student).__name__} has no "
                "'num_classes'. Give it as ICDDistiller(num_classes=...)."
            )
        super().bind(student, teacher)

    def bind_shapes(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """See :meth:`PyramidDistiller.bind_shapes`."""
        weights = self.scalar_weights
        super().bind_shapes(student, teacher)
        self.scalar_weights = weights

    def build(self, student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> None:
        """Make encoder, decoder, predictor and the student's projection.

        Raises:
            ValueError: levels of unlike channels.
        """
        channels: dict[str, int] = {}
        for whose, shapes in (("student", student), ("teacher", teacher)):
            found = {level: int(shape.channels) for level, shape in shapes.items()}
            if len(set(found.values())) > 1:
                raise ValueError(
                    f"ICDDistiller takes all levels as one, but those of the {whose} have other "
                    f"channels: {found}. Name levels of an FPN in MODEL.DISTILL.IN_FEATURES."
                )
            channels[whose] = next(iter(found.values()))
        self.encoder = QueryEncoder(self.num_classes, self.dim)
        self.decoder = Decoder(channels["teacher"], self.dim, self.heads, self.hidden_dim)
        self.predictor = mlp(self.dim, self.dim, 5)
        self.student_value = nn.Linear(channels["student"], self.dim)
        xavier(self.student_value)

    def param_groups(self, base_lr: float) -> list[dict[str, Any]]:
        """One group: AdamW, the learning rate by a cosine to 0, clipped as a whole."""
        return [
            {
                "params": list(self.parameters()),
                "optimizer": "AdamW",
                "lr": self.lr,
                "weight_decay": self.weight_decay,
                "schedule": CosineParamScheduler(1.0, 0.0),
                "clip_norm": self.clip_norm,
            }
        ]

    def forward(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            student, teacher: maps (N, C, H, W) by level.
            batch: sizes and ground truth of the images.

        Returns:
            the weighted sum of the three parts, and each unweighted: "value", "real", "sides".

        Raises:
            ValueError: training images without ground truth.
        """
        instances = batch.ground_truth(type(self).__name__)
        queries = draw_queries(
            [x.gt_boxes.tensor for x in instances],
            [x.gt_classes for x in instances],
            batch.image_sizes,
            num_classes=self.num_classes,
            generator=batch.generator(self.name),
            **self.drawing,
        )
        maps = [self.align(k, student[k], teacher[k], batch) for k in self.levels]
        if batch.iteration < self.detach_iters:
            maps = [level._replace(student=level.student.detach()) for level in maps]
        # Softmax over all cells, and moments of a head: float32.
        with torch.autocast(batch.device.type, enabled=False):
            parts = self.parts(maps, queries)
        total = torch.stack([self.scalar_weights[k] * v for k, v in parts.items()]).sum()
        return total, {k: v.detach() for k, v in parts.items()}

    def parts(self, maps: Sequence[LevelMaps], queries: Queries) -> dict[str, torch.Tensor]:
        """The three unweighted parts of the loss."""
        ours, theirs = (
            torch.cat([x.float().flatten(2) for x in side], dim=2).transpose(1, 2)
            for side in ([x.student for x in maps], [x.teacher for x in maps])
        )
        positions = torch.cat([cell_positions(x.mask).flatten(1, 2) for x in maps], dim=1)
        padded = any(x.padded for x in maps)
        decoded, attention, values = self.decoder(
            self.encoder(queries),
            theirs,
            sine_encoding(positions, self.dim // 2),
            torch.cat([x.mask.flatten(1) for x in maps], dim=1) if padded else None,
        )
        weights = torch.einsum("nhqs,nq->nhs", attention.detach(), queries.real.float())
        student_values = self.student_value(ours).unflatten(-1, (self.heads, -1))
        found = self.predictor(decoded)
        return {
            "value": value_loss(student_values, values.detach(), weights),
            "real": real_loss(found[..., 0], queries),
            "sides": sides_loss(found[..., 1:], queries),
        }


def value_loss(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over the cells of the squared difference of two heads' normalised values.

    Args:
        student, teacher: (N, S, h, D / h).
        weights: (N, h, S), >= 0; an image without any counts as 0.

    Returns:
        scalar, the mean over images, heads and channels.
    """
    shape = student.shape[-1:]
    error = (F.layer_norm(student, shape) - F.layer_norm(teacher, shape)).square()
    total = torch.einsum("nhs,nshd->nhd", weights, error)
    return (total / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)).mean()


def real_loss(logits: torch.Tensor, queries: Queries) -> torch.Tensor:
    """Binary cross entropy of (N, Q) logits, the mean over the boxes of all images."""
    loss = F.binary_cross_entropy_with_logits(logits, queries.real.float(), reduction="none")
    return (loss * queries.valid).sum() / queries.valid.sum()


def sides_loss(logits: torch.Tensor, queries: Queries) -> torch.Tensor:
    """L1 of the distances from a box's centre to its left, top, right and bottom.

    Args:
        logits: (N, Q, 4), of the distances as shares of the image's width and height.
        queries: of which the real boxes count.

    Returns:
        scalar: the sum over the sides of |difference| / the box's width or height, the mean over
        the real boxes of all images; 0 without any.
    """
    distances = torch.cat(
        [queries.centers - queries.boxes[..., :2], queries.boxes[..., 2:] - queries.centers], -1
    )
    extents = (queries.boxes[..., 2:] - queries.boxes[..., :2]).repeat(1, 1, 2).clamp(min=1e-7)
    loss = ((logits.sigmoid() - distances).abs() / extents).sum(dim=-1)
    return (loss * queries.real).sum() / queries.real.sum().clamp(min=1)
