"""The weight of a term by the size of its gradient: ``MODEL.DISTILL.LOSS_WEIGHT "auto"``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed, nn

from ...ops.options import check_number
from ..taps import tappable_levels

AUTO = "auto"
#: Iterations that are measured: the first ones, then every PERIOD-th.
FIRST, PERIOD = 10, 20
#: Measurements that the norms are averaged over.
WINDOW = 10
#: Where torch's gradient scaler begins: float16 holds the gradients of a loss of this size.
SCALE = 65536.0


class GradientBalance(nn.Module):
    """Keeps the gradient of a term at ``share`` times that of the detection losses.

    Both are measured at the student's maps: the levels that the term compares, or the outputs of
    the backbone for a method that compares heads. Norms are over all levels, images and processes,
    and averaged over time. The averages are buffers: a resumed training goes on with them.

    Attributes:
        student_taps: the levels at which gradients are measured; set by :meth:`bind`.
        detection, distillation: the averaged norms; of the term's unweighted loss.
        count: number of measurements.
        measured_share: of the last measurement.
        iteration: of the last measurement, -1 before it.
    """

    student_taps: Sequence[str] = ()
    detection: torch.Tensor
    distillation: torch.Tensor
    count: torch.Tensor
    measured_share: torch.Tensor

    def __init__(self, share: float) -> None:
        """
        Args:
            share: >= 0; 10 makes the gradient of the term ten times that of the detection losses.

        Raises:
            ValueError: it is negative or not finite.
        """
        super().__init__()
        self.share = check_number("share", share, least=0)
        self.iteration = -1
        for name in ("detection", "distillation", "count", "measured_share"):
            self.register_buffer(name, torch.zeros(()))

    def bind(self, student: Any, taps: Sequence[str]) -> None:
        """Choose the levels.

        Args:
            student: the detector that is trained.
            taps: of the term.

        Raises:
            ValueError: the student has no levels.
        """
        known = tappable_levels(student)
        if not known:
            raise ValueError(
                f"weight is 'auto', but the student {type(student).__name__} has no 'backbone' "
                "with an output_shape(), at whose outputs gradients are measured; expected a "
                "Detectron2 backbone, or a number."
            )
        self.student_taps = [tap for tap in taps if tap in known]
        self.student_taps = self.student_taps or list(student.backbone.output_shape())

    def weight(self) -> torch.Tensor:
        """The weight, a scalar; 1 before the first measurement that tells it."""
        return torch.where(self.count > 0, self.share * self.detection / self.distillation, 1.0)

    def update(self, detection: torch.Tensor, distillation: torch.Tensor, iteration: int) -> None:
        """Take in a measurement; one that is not finite, or without distillation, is left out.

        Args:
            detection, distillation: norms of the gradients, scalars; of the unweighted loss.
            iteration: of the training.
        """
        self.iteration = iteration
        tells = torch.isfinite(detection) & torch.isfinite(distillation) & (distillation > 0)
        self.count.add_(tells)
        for mean, value in ((self.detection, detection), (self.distillation, distillation)):
            step = (value - mean) / self.count.clamp(1, WINDOW)
            mean.add_(torch.where(tells, step, 0.0))
        share = self.weight() * distillation / detection
        self.measured_share.copy_(torch.where(tells, share, self.measured_share))


def measure_gradients(
    terms: Sequence[tuple[GradientBalance | None, torch.Tensor]],
    detection: Mapping[str, torch.Tensor],
    outputs: Mapping[str, Any],
    iteration: int,
) -> None:
    """Update the balances of the terms that have one, if it is time.

    Args:
        terms: the balance and the unweighted loss of each.
        detection: the student's own losses.
        outputs: of the student, by tap.
        iteration: of the training. The parts of an accumulated batch have the same, and the same
            weight: that of the first part.

    Raises:
        ValueError: no map has a gradient.
    """
    due = iteration < FIRST or iteration % PERIOD == 0
    found = [(b, loss) for b, loss in terms if b is not None and due and b.iteration != iteration]
    if not found:
        return
    levels = list(dict.fromkeys(name for balance, _ in found for name in balance.student_taps))
    levels = [name for name in levels if outputs[name].requires_grad]
    if not levels:
        raise ValueError(
            "MODEL.DISTILL.LOSS_WEIGHT is 'auto', but no map of the student has a gradient: its "
            "backbone is frozen. Expected a number."
        )
    maps = [outputs[name] for name in levels]
    losses = [torch.stack([x.sum() for x in detection.values()]).sum(), *(x for _, x in found)]
    squares = torch.stack([_squared_norms(loss, maps) for loss in losses])
    if comm.get_world_size() > 1:
        distributed.all_reduce(squares)
    for row, (balance, _) in zip(squares[1:], found, strict=True):
        used = [i for i, name in enumerate(levels) if name in balance.student_taps]
        balance.update(squares[0, used].sum().sqrt(), row[used].sum().sqrt(), iteration)


def _squared_norms(loss: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """(M,) of the gradients of a loss at the maps."""
    loss = loss.float()
    if not loss.requires_grad:
        return loss.new_zeros(len(maps))
    # Losses of all magnitudes are brought to 1: half precision holds no gradient of a large sum.
    scale = loss.detach().abs() / SCALE
    found = torch.autograd.grad(loss, maps, 1 / scale, retain_graph=True, allow_unused=True)
    zero = torch.zeros_like(scale)
    return torch.stack([zero if g is None else (g.float() * scale).square().sum() for g in found])
