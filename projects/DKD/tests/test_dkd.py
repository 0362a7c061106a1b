"""DKD at the RoI head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage

from ssim_kd.projects.dkd import DKDDistiller
from ssim_kd.projects.dkd.distiller import decoupled_kl
from tests.helpers import make_batch, train_losses
from tests.projects.float64 import number, softmax
from tests.projects.heads import MethodOfHeads


def expected_parts(student: Any, teacher: Any, target: Any, t: float) -> tuple[float, float]:
    tckd = nckd = 0.0
    for s, q, y in zip(student, teacher, target, strict=True):
        p, q = softmax(s / t), softmax(q / t)
        tckd += q[y] * math.log(q[y] / p[y]) + (1 - q[y]) * math.log((1 - q[y]) / (1 - p[y]))
        for k in range(len(p)):
            if k != y:
                ours, theirs = p[k] / (1 - p[y]), q[k] / (1 - q[y])
                nckd += theirs * math.log(theirs / ours)
    return tckd * t**2 / len(target), nckd * t**2 / len(target)


class TestDKD(MethodOfHeads):
    method = DKDDistiller
    options = {"alpha": 2.0, "beta": 0.5}
    weights = (1.0, None)
    kinds = at_rest = ("faster",)
    bad = [
        ("alpha", -1.0, "DKD.ALPHA"),
        ("beta", math.nan, "DKD.BETA"),
        ("temperature", 0.0, "DKD.TEMPERATURE"),
    ]
    reaches = ("roi_heads.box_predictor.cls_score",)
    spares = (*MethodOfHeads.spares, "roi_heads.box_predictor.bbox_pred")

    def test_by_hand(self) -> None:
        # Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), the first is the target.
        teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
        student = torch.tensor([[0.25, 0.25, 0.5]]).log()
        tckd, nckd = decoupled_kl(student, teacher, torch.tensor([0]))
        assert float(tckd) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
        # Among the others: (1/2, 1/2) against (1/3, 2/3).
        assert float(nckd) == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75))

    def test_the_formula_in_float64(self) -> None:
        """On the student's proposals, in both heads."""
        model, calls = self.model("faster"), []
        model.student.roi_heads.register_forward_hook(lambda *x: calls.append(x))
        inputs = make_batch(((64, 96), (48, 64)))
        total = train_losses(model, inputs)["loss_distill"]
        proposals, _ = calls[0][2]
        boxes = [x.proposal_boxes for x in proposals]
        logits = []
        for detector in (model.student, model.teacher.model):
            # The student's batch norms as in its training step.
            maps = detector.backbone(detector.preprocess_image(inputs).tensor)
            heads = detector.roi_heads
            pooled = heads.box_pooler([maps[k] for k in ("p2", "p3", "p4", "p5")], boxes)
            logits.append(number(heads.box_predictor(heads.box_head(pooled))[0]))
        target = torch.cat([x.gt_classes for x in proposals]).tolist()
        assert 5 in target and 1 in target  # the background is a class
        tckd, nckd = expected_parts(*logits, target, 1.0)
        assert float(model.metrics["distill/dkd_target"]) == pytest.approx(tckd, rel=1e-3)
        assert float(model.metrics["distill/dkd_others"]) == pytest.approx(nckd, rel=1e-3)
        assert float(total.detach()) == pytest.approx(2 * tckd + 0.5 * nckd, rel=1e-3)


def test_decoupled_kl_of_another_temperature() -> None:
    student, teacher = 3 * torch.randn(7, 5), 3 * torch.randn(7, 5)
    target = torch.tensor([0, 4, 2, 1, 3, 4, 0])
    found = decoupled_kl(student, teacher, target, 4.0)
    expected = expected_parts(number(student), number(teacher), target.tolist(), 4.0)
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-4)


def test_decoupled_kl_of_sure_logits_and_without_rows() -> None:
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 200.0, 0.0]])
    for rows in (1, 0):
        found = sum(decoupled_kl(student[:rows], teacher[:rows], torch.tensor([0])[:rows]))
        found.backward()
        assert torch.isfinite(found) and torch.isfinite(student.grad).all()
        assert (float(found.detach()) > 0) == (rows == 1)
    # Two classes: there is one other, of probability 1.
    two = decoupled_kl(student[:, :2].detach(), teacher[:, :2], torch.tensor([0]))
    assert float(two[1]) == 0


def test_dkd_trains_with_boxes_predicted() -> None:
    # The student's head replaces the proposals' boxes after it has read them.
    model = TestDKD().model("faster", "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    with EventStorage(0):
        losses = train_losses(model, make_batch(((64, 96), (48, 64))))
    assert torch.isfinite(losses["loss_distill"])
