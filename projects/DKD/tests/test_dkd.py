"""DKD at the RoI head: against loops, and what may go wrong around them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from ssim_kd.modeling import DistilledDetector, FrozenTeacher
from ssim_kd.projects.dkd import DKDDistiller
from ssim_kd.projects.dkd.distiller import decoupled_kl
from tests.helpers import (
    bfloat16_without_onednn,
    build,
    gradients,
    make_batch,
    stock_config,
    train_losses,
)

SIZES = ((64, 96), (48, 64))


def test_decoupled_kl_worked_by_hand() -> None:
    # Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), the first is the target.
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    tckd, nckd = decoupled_kl(student, teacher, torch.tensor([0]))
    assert float(tckd) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    # Among the others: (1/2, 1/2) against (1/3, 2/3).
    assert float(nckd) == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75))


def expected_parts(student: Any, teacher: Any, target: Any, t: float) -> tuple[float, float]:
    tckd = nckd = 0.0
    for s, q, y in zip(student, teacher, target, strict=True):
        p, q = (np.exp(x / t) / np.exp(x / t).sum() for x in (s, q))
        tckd += q[y] * math.log(q[y] / p[y]) + (1 - q[y]) * math.log((1 - q[y]) / (1 - p[y]))
        for k in range(len(p)):
            if k != y:
                ours, theirs = p[k] / (1 - p[y]), q[k] / (1 - q[y])
                nckd += theirs * math.log(theirs / ours)
    return tckd * t**2 / len(target), nckd * t**2 / len(target)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_kl_equals_a_loop(temperature) -> None:
    student, teacher = 3 * torch.randn(7, 5), 3 * torch.randn(7, 5)
    target = torch.tensor([0, 4, 2, 1, 3, 4, 0])
    found = decoupled_kl(student, teacher, target, temperature)
    arrays = [x.double().numpy() for x in (student, teacher)]
    expected = expected_parts(*arrays, target.tolist(), temperature)
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-4)
    assert all(
        float(x) == pytest.approx(0, abs=1e-6) for x in decoupled_kl(teacher, teacher, target)
    )


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


def distilled(
    teacher: Any = None, kind: str = "faster", *opts: Any, **options: Any
) -> DistilledDetector:
    return DistilledDetector(
        student=build(stock_config(kind, *opts)),
        teacher=FrozenTeacher(teacher or build(stock_config("faster", fpn=48), seed=1)),
        distillers=[DKDDistiller(**options)],
        max_iter=10,
    )


def test_dkd_is_of_the_students_proposals_in_both_heads() -> None:
    model = distilled(alpha=2.0, beta=0.5)
    calls = []
    model.student.roi_heads.register_forward_hook(lambda *x: calls.append(x))
    inputs = make_batch(SIZES)
    total = train_losses(model, inputs)["loss_distill"]
    proposals, _ = calls[0][2]
    boxes = [x.proposal_boxes for x in proposals]
    logits = []
    for detector in (model.student, model.teacher.model):
        # The student's batch norms as in its training step.
        images = detector.preprocess_image(inputs).tensor
        maps, heads = detector.backbone(images), detector.roi_heads
        pooled = heads.box_pooler([maps[k] for k in ("p2", "p3", "p4", "p5")], boxes)
        logits.append(heads.box_predictor(heads.box_head(pooled))[0].detach().double().numpy())
    target = torch.cat([x.gt_classes for x in proposals]).tolist()
    assert 5 in target and 1 in target  # the background is a class
    tckd, nckd = expected_parts(*logits, target, 1.0)
    assert float(model.metrics["distill/dkd_target"]) == pytest.approx(tckd, rel=1e-3)
    assert float(model.metrics["distill/dkd_others"]) == pytest.approx(nckd, rel=1e-3)
    assert float(total.detach()) == pytest.approx(2 * tckd + 0.5 * nckd, rel=1e-3)
    total.backward()
    own = gradients(model.student)
    assert own["roi_heads.box_predictor.cls_score.weight"].any()
    assert own["backbone.fpn_output2.weight"].any()
    assert "roi_heads.box_predictor.bbox_pred.weight" not in own
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert not list(model.distillers["dkd"].parameters())


def test_dkd_of_twins_is_0() -> None:
    student = build(stock_config("faster", "MODEL.RESNETS.NORM", "FrozenBN"))
    model = DistilledDetector(
        student=student,
        teacher=FrozenTeacher(copy.deepcopy(student)),
        distillers=[DKDDistiller()],
        max_iter=10,
    )
    assert float(train_losses(model, make_batch(SIZES))["loss_distill"]) == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize("case", ["no box", "flat"])
def test_dkd_survives(case) -> None:
    model = distilled()
    batch = make_batch(SIZES)[: 1 if case == "no box" else 2]
    if case == "no box":
        batch[0]["instances"] = batch[0]["instances"][[]]
    else:
        batch[1]["instances"].gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 8.0, 30.0]]))
    with bfloat16_without_onednn(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = train_losses(model, batch)["loss_distill"]
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and loss > 0
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_two_halves_of_the_rows_are_the_whole() -> None:
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    target = torch.randint(0, 5, (8,))
    whole, first, second = (
        sum(decoupled_kl(student[r], teacher[r], target[r]))
        for r in (slice(0, 8), slice(0, 4), slice(4, 8))
    )
    torch.testing.assert_close(whole, (first + second) / 2)


@pytest.mark.parametrize(
    ("kind", "teacher", "named"),
    [
        ("retinanet", "faster", ("student", "RetinaNet", "StandardROIHeads")),
        ("faster", "cascade", ("teacher", "CascadeROIHeads")),
        ("faster", "retinanet", ("teacher", "RetinaNet")),
    ],
)
def test_dkd_refuses_what_it_cannot_serve(kind, teacher, named) -> None:
    with pytest.raises(ValueError) as caught:
        distilled(build(stock_config(teacher, fpn=48), seed=1), kind)
    assert all(name in str(caught.value) for name in named)


def test_dkd_needs_equal_classes() -> None:
    teacher = build(stock_config("faster", "MODEL.ROI_HEADS.NUM_CLASSES", 7, fpn=48))
    with pytest.raises(ValueError, match="5 classes and the teacher 7"):
        distilled(teacher)


def test_dkd_trains_with_boxes_predicted() -> None:
    # The student's head replaces the proposals' boxes after it has read them.
    model = distilled(None, "faster", "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    with EventStorage(0):
        losses = train_losses(model, make_batch(SIZES))
    assert torch.isfinite(losses["loss_distill"])
