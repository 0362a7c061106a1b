"""The distiller of DKD at the RoI head (Zhao et al., CVPR 2022, arXiv 2203.08679)."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from ssim_kd.modeling import DISTILLER_REGISTRY, DistillBatch, RoIHeadDistiller, check_number
from ssim_kd.modeling.distillers.roi_heads import teacher_predictions


def decoupled_kl(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of KL(teacher || student), both times T^2 and as the mean over the rows.

    Args:
        student, teacher: logits (R, K), K >= 2.
        target: class of each row, (R,) int64.
        temperature: T > 0.

    Returns:
        TCKD, of the target against all others: KL over (p_target, 1 - p_target); and NCKD, among
        the others: KL of their softmax. 0 without rows.
    """
    target = target[:, None]
    # The indices of all classes but the target.
    others = torch.arange(student.shape[1] - 1, device=target.device).expand(len(target), -1)
    others = others + (others >= target)
    binary, among = [], []
    for logits in (student, teacher):
        log_p = (logits.float() / temperature).log_softmax(dim=1)
        rest = log_p.gather(1, others)
        log_rest = rest.logsumexp(dim=1, keepdim=True)
        binary.append(torch.cat([log_p.gather(1, target), log_rest], dim=1))
        among.append(rest - log_rest)
    scale = temperature**2 / max(len(target), 1)
    tckd, nckd = (
        F.kl_div(s, t, reduction="sum", log_target=True) * scale for s, t in (binary, among)
    )
    return tckd, nckd


@DISTILLER_REGISTRY.register()
class DKDDistiller(RoIHeadDistiller):
    """alpha TCKD + beta NCKD of the class logits, on the proposals that the student trains with.

    Both box heads read their own maps; the background is a class. See :func:`decoupled_kl`.
    """

    keys = {"alpha": "DKD.ALPHA", "beta": "DKD.BETA", "temperature": "DKD.TEMPERATURE"}
    student_taps = ("roi_heads", *RoIHeadDistiller.student_taps)

    @configurable
    def __init__(
        self,
        *,
        name: str = "dkd",
        alpha: float = 1.0,
        beta: float = 0.25,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: see :class:`Distiller`.
            alpha, beta: weights of the two parts, >= 0.
            temperature: T of the softmax, > 0.
            kwargs: of :class:`Distiller`.

        Raises:
            ValueError: a value out of its range.
        """
        weights = {
            "target": check_number("alpha", alpha, least=0),
            "others": check_number("beta", beta, least=0),
        }
        super().__init__(name=name, part_weights=weights, **kwargs)
        self.temperature = check_number("temperature", temperature, above=0)

    def parts(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Distiller.parts`."""
        proposals, _ = student["roi_heads"][0].output
        logits, _ = self.student_predictions(student, batch)
        soft, _ = teacher_predictions(student, teacher, batch)
        target = torch.cat([x.gt_classes for x in proposals])
        tckd, nckd = decoupled_kl(logits, soft, target, self.temperature)
        return {"target": tckd, "others": nckd}
