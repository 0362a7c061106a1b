"""The distiller of ICD (Kang et al., NeurIPS 2021, arXiv 2110.12724)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
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
    part_keys,
)

from .modules import (
    Decoder,
    Queries,
    QueryEncoder,
    cell_positions,
    draw_queries,
    mlp,
    sine_encoding,
    start_as_attention,
)


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

    keys = {
        **{
            name: f"ICD.{name.upper()}"
            for name in (
                *("dim", "heads", "hidden_dim", "fake_ratio", "max_boxes", "fake_size"),
                *("jitter", "detach_iters", "lr", "weight_decay", "clip_norm"),
            )
        },
        **part_keys("ICD", "value", "real", "sides"),
    }
    # The attention has an entry for each box, head and cell, and p2 has many cells.
    defaults = {
        "levels": ("p2", "p3", "p4", "p5", "p6"),
        "part_weights": {"value": 3.0, "real": 1.0, "sides": 1.0},
        "max_boxes": 100,
    }
    dense_defaults = {
        "levels": ("p3", "p4", "p5", "p6", "p7"),
        "part_weights": {"value": 8.0, "real": 1.0, "sides": 1.0},
        "max_boxes": 300,
    }
    adapts = False

    @configurable
    def __init__(
        self,
        *,
        name: str = "icd",
        num_classes: int = 0,
        dim: int = 256,
        heads: int = 8,
        hidden_dim: int = 1024,
        fake_ratio: float = 5.0,
        max_boxes: int | None = None,
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
            dim, heads, hidden_dim: of the decoder.
            fake_ratio, max_boxes, fake_size, jitter: see :func:`draw_queries`; max_boxes None for
                the method's own.
            detach_iters: iterations in which the student does not learn of it.
            lr, weight_decay, clip_norm: of the AdamW of the method's modules.
            kwargs: of :class:`PyramidDistiller`; part_weights of "value", "real" and "sides".

        Raises:
            ValueError: a value out of its range.
        """
        super().__init__(name=name, **kwargs)
        if self.level_weights:
            raise ValueError(
                f"level_weights is {self.level_weights}; expected [] with ICD, which takes all "
                "levels as one."
            )
        self.dim = check_number("dim", dim, least=4, whole=True)
        self.heads = check_number("heads", heads, least=1, whole=True)
        if dim % heads or dim % 4:
            raise ValueError(f"dim is {dim}; expected a multiple of 4 and of `heads` ({heads}).")
        self.hidden_dim = check_number("hidden_dim", hidden_dim, least=1, whole=True)
        if len(fake_size) != 2:
            raise ValueError(f"fake_size is {fake_size}; expected a mean and a deviation.")
        mean, deviation = (check_number("fake_size", v, least=0) for v in fake_size)
        self.num_classes = num_classes
        self.max_boxes = check_number("max_boxes", max_boxes, least=1, whole=True, optional=True)
        self.drawing: dict[str, Any] = {
            "fake_ratio": check_number("fake_ratio", fake_ratio, least=0),
            "fake_size": (mean, deviation),
            "jitter": check_number("jitter", jitter, least=0, most=0.5),
        }
        self.detach_iters = check_number("detach_iters", detach_iters, least=0, whole=True)
        self.lr = check_number("lr", lr, least=0)
        self.weight_decay = check_number("weight_decay", weight_decay, least=0)
        self.clip_norm = check_number("clip_norm", clip_norm, above=0)

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
                    f"channels: {found}. Name levels of an FPN in `levels`."
                )
            channels[whose] = next(iter(found.values()))
        self.encoder = QueryEncoder(self.num_classes, self.dim)
        self.decoder = Decoder(channels["teacher"], self.dim, self.heads, self.hidden_dim)
        self.predictor = mlp(self.dim, self.dim, 5)
        self.student_value = nn.Linear(channels["student"], self.dim)
        start_as_attention(self.student_value)

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

    def pyramid_loss(
        self, maps: Sequence[LevelMaps], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """The three unweighted parts of the loss: "value", "real" and "sides".

        Raises:
            ValueError: training images without ground truth.
        """
        queries = draw_queries(
            batch.boxes(type(self).__name__),
            [x.gt_classes for x in batch.instances or ()],
            batch.image_sizes,
            num_classes=self.num_classes,
            max_boxes=self.max_boxes,
            generator=batch.generator(self.name),
            **self.drawing,
        )
        if batch.iteration < self.detach_iters:
            maps = [level._replace(student=level.student.detach()) for level in maps]
        return self.losses(maps, queries)

    def losses(self, maps: Sequence[LevelMaps], queries: Queries) -> dict[str, torch.Tensor]:
        """The three unweighted parts of the loss for given boxes."""
        ours, theirs = (
            torch.cat([x.flatten(2) for x in side], dim=2).transpose(1, 2)
            for side in ([x.student for x in maps], [x.teacher for x in maps])
        )
        masks = [
            torch.ones_like(x.teacher[:, 0], dtype=torch.bool) if x.mask is None else x.mask
            for x in maps
        ]
        positions = torch.cat([cell_positions(mask).flatten(1, 2) for mask in masks], dim=1)
        decoded, attention, values = self.decoder(
            self.encoder(queries),
            theirs,
            sine_encoding(positions, self.dim // 2),
            torch.cat([mask.flatten(1) for mask in masks], dim=1)
            if any(x.mask is not None for x in maps)
            else None,
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
