"""Distillation of heads: the functions against plain loops, the distillers on small detectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import nn

from ssim_kd.modeling import DenseHeadDistiller, DistillBatch, RCNNHeadDistiller, Tap
from ssim_kd.modeling.distillers.dense_heads import (
    DensePredictions,
    anchor_normalizer,
    anchor_targets,
    decode,
    dense_predictions,
    quality_bce,
    weighted_giou,
)
from ssim_kd.modeling.distillers.roi_heads import softmax_kd, top_class_delta_l1
from tests.helpers import make_batch, train_losses
from tests.projects.heads import MethodOfHeads
from tests.projects.method import detector, distilled, teacher_of

# The functions, against loops over float64 numbers


def numbers(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_softmax_kd_is_the_mean_divergence(temperature) -> None:
    student, teacher = numbers(7, 4, seed=0), numbers(7, 4, seed=1)
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = softmax_kd(student, teacher, temperature)
    assert float(found) == pytest.approx(temperature**2 * total / 7, rel=1e-5)


def test_softmax_kd_of_equal_logits_is_its_minimum() -> None:
    teacher = numbers(5, 4)
    student = (teacher + 3).requires_grad_()  # a constant in all logits of a row does not matter
    loss = softmax_kd(student, teacher, 2.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6 and float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("classes", [3, 1])
def test_top_class_delta_l1_by_a_loop(classes) -> None:
    # With one set of deltas for all classes, it is compared whichever class is likely.
    logits = numbers(6, 3 + 1, seed=2)
    student, teacher = numbers(6, 4 * classes, seed=0), numbers(6, 4 * classes, seed=1)
    total = weights = 0.0
    for ours, theirs, row in zip(student.tolist(), teacher.tolist(), logits.tolist(), strict=True):
        foreground = softmax(row)[:-1]
        weight = max(foreground)
        first = 4 * foreground.index(weight) if classes > 1 else 0
        total += weight * sum(abs(ours[first + i] - theirs[first + i]) for i in range(4))
        weights += weight
    found = top_class_delta_l1(student, teacher, logits)
    assert float(found) == pytest.approx(total / (4 * weights), rel=1e-5)


def test_head_losses_without_rows_are_0_and_have_a_gradient() -> None:
    logits, deltas = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 12, requires_grad=True)
    losses = (
        softmax_kd(logits, torch.zeros(0, 4), 1.0),
        top_class_delta_l1(deltas, torch.zeros(0, 12), torch.zeros(0, 4)),
    )
    for loss in losses:
        assert float(loss.detach()) == 0 and loss.shape == ()
        loss.backward()


def test_quality_bce_by_a_loop() -> None:
    student, teacher = numbers(3, 4, seed=0), numbers(3, 4, seed=1)
    found = quality_bce(student, teacher)
    assert found.shape == student.shape
    for value, s, t in zip(*(x.flatten().tolist() for x in (found, student, teacher)), strict=True):
        q, target = sigmoid(s), sigmoid(t)
        bce = -(target * math.log(q) + (1 - target) * math.log(1 - q))
        assert value == pytest.approx(abs(q - target) * bce, rel=1e-4, abs=1e-7)


def test_quality_bce_differentiates_the_factor_as_well() -> None:
    teacher = numbers(2, 3, seed=1).double()
    student = numbers(2, 3, seed=0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: quality_bce(s, teacher), (student,))


def test_weighted_giou_by_hand() -> None:
    # Equal: 0. Side by side, 2 x 2 each in a hull of 6 x 2: IoU 0, GIoU -(12 - 8) / 12.
    # Half covered, 4 x 2 and 2 x 2 in it: IoU 4 / 8, the hull is the union.
    ours = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 4, 2]])
    theirs = torch.tensor([[0.0, 0, 2, 2], [4, 0, 6, 2], [1, 0, 3, 2]])
    weights = torch.tensor([5.0, 0.5, 2.0])
    expected = 5 * 0 + 0.5 * (1 + 1 / 3) + 2 * (1 - 0.5)
    assert float(weighted_giou(ours, theirs, weights)) == pytest.approx(expected, rel=1e-5)
    shaped = [x.view(1, 3, -1) for x in (ours, theirs)]
    found = weighted_giou(*shaped, weights.view(1, 3))
    assert float(found) == pytest.approx(expected, rel=1e-5)


class Coded:
    """What :func:`decode` needs of a detector."""

    box2box_transform = Box2BoxTransform(weights=(1.0, 2.0, 3.0, 4.0))


def test_decode_by_a_loop() -> None:
    levels = [torch.tensor([[0.0, 0, 8, 4]]), torch.tensor([[4.0, 4, 20, 36], [0, 0, 2, 2]])]
    deltas = numbers(2, 3, 4, scale=0.5)
    found = decode(Coded(), DensePredictions(deltas, deltas, [Boxes(x) for x in levels]))
    assert found.shape == (2, 3, 4)
    anchors = [box for level in levels for box in level.tolist()]
    for image in range(2):
        for i, (x1, y1, x2, y2) in enumerate(anchors):
            dx, dy, dw, dh = (
                d / w for d, w in zip(deltas[image, i].tolist(), (1, 2, 3, 4), strict=True)
            )
            w, h = x2 - x1, y2 - y1
            cx, cy = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h
            w, h = w * math.exp(dw), h * math.exp(dh)
            expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            assert found[image, i].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


# Small detectors


class TestRCNNHead(MethodOfHeads):
    method = RCNNHeadDistiller
    weights = (1.0, None)
    kinds = at_rest = ("faster", "mask")
    bad = [
        ("part_weights.cls", -1.0, "HEAD.CLS_WEIGHT"),
        ("temperature", 0.0, "HEAD.TEMPERATURE"),
    ]
    reaches = ("roi_heads.box_",)
    refused = [
        ("cascade", "faster", ("RCNNHeadDistiller", "student", "CascadeROIHeads")),
        ("faster", "cascade", ("RCNNHeadDistiller", "teacher", "CascadeROIHeads")),
        ("c4", "faster", ("RCNNHeadDistiller", "student", "Res5ROIHeads")),
        ("retinanet", "faster", ("RCNNHeadDistiller", "student", "RetinaNet")),
        ("faster", "retinanet", ("RCNNHeadDistiller", "teacher", "RetinaNet")),
    ]


def squares(*sizes: int) -> list[Any]:
    return [
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[size] for size in sizes]),
        *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]),
    ]


FIVE = squares(8, 16, 32, 64, 128)
LEVELS = "MODEL.RETINANET.IN_FEATURES"


class TestDenseHead(MethodOfHeads):
    method = DenseHeadDistiller
    weights = (None, 1.0)
    kinds = at_rest = ("retinanet", "fcos")
    bad = [("part_weights.box", math.nan, "HEAD.BOX_WEIGHT")]
    reaches = ("head.",)
    # Neither where to look nor masks are compared.
    spares = ("head.ctrness",)
    refused = [
        ("faster", "retinanet", ("DenseHeadDistiller", "student", "GeneralizedRCNN")),
        ("retinanet", "faster", ("DenseHeadDistiller", "teacher", "GeneralizedRCNN")),
        ("retinanet", "fcos", ("anchors a cell", "9", "1")),
        (["retinanet", *FIVE], "fcos", ("box coding", "Linear")),
        (
            ["retinanet", LEVELS, ["p3", "p4", "p5"], *squares(32, 64, 128)],
            ["retinanet", *FIVE],
            ("anchors a cell",),
        ),
        (
            ["retinanet", LEVELS, ["p3", "p4"], *squares(32, 64)],
            ["retinanet", LEVELS, ["p4", "p5"], *squares(32, 64)],
            ("strides", "[8, 16] and [16, 32]"),
        ),
    ]


def test_rcnn_head_distiller_asks_the_teacher_about_the_students_proposals() -> None:
    student, teacher = detector("faster"), teacher_of("faster")
    model = distilled(student, teacher, RCNNHeadDistiller(temperature=2.0, cls_weight=3.0))
    twin = teacher_of("faster").eval()
    batch = make_batch()
    with Tap(student, ["roi_heads.box_pooler", "roi_heads.box_predictor"]) as calls:
        loss = train_losses(model, batch)["loss_distill"]
    boxes = calls["roi_heads.box_pooler"][0].inputs[1]
    logits, deltas = calls["roi_heads.box_predictor"][0].output
    assert len(logits) == sum(len(b) for b in boxes) == 2 * 16
    with torch.no_grad():
        maps = twin.backbone(twin.preprocess_image(batch).tensor)
        heads = twin.roi_heads
        pooled = heads.box_pooler([maps[k] for k in heads.box_in_features], boxes)
        soft, soft_deltas = heads.box_predictor(heads.box_head(pooled))
    cls, box = softmax_kd(logits, soft, 2.0), top_class_delta_l1(deltas, soft_deltas, soft)
    torch.testing.assert_close(loss, 3 * cls + box)
    torch.testing.assert_close(model.metrics["distill/rcnn_head_cls"], cls.detach())
    torch.testing.assert_close(model.metrics["distill/rcnn_head_cls_weighted"], 3 * cls.detach())


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_dense_head_distiller_by_the_detectors_own_parts(kind) -> None:
    student, teacher = detector(kind), teacher_of(kind)
    model = distilled(student, teacher, DenseHeadDistiller(box_weight=2.0))
    twin, batch = teacher_of(kind).eval(), make_batch()
    with Tap(student, ["head"]) as calls:
        loss = train_losses(model, batch)["loss_distill"]
    ours = calls["head"][0].output
    with torch.no_grad():
        maps = twin.backbone(twin.preprocess_image(batch).tensor)
        theirs = twin.head([maps[k] for k in twin.head_in_features])
    anchors = student.anchor_generator(list(ours[0]))
    labels, _ = student.label_anchors(anchors, [x["instances"] for x in batch])
    # RetinaNet's running mean of the positives starts at 100, FCOS' at 300.
    normalizer = student.loss_normalizer
    positives = sum(int(((x >= 0) & (x < 5)).sum()) for x in labels)
    assert 0 < positives < normalizer < 300
    cls = box = torch.zeros(())
    for image in range(2):
        first = 0
        for level, level_anchors in enumerate(anchors):
            # (A K, H, W) to one row an anchor, as Detectron2 orders them: cell by cell.
            s, t, sd, td = (
                x[level][image].permute(1, 2, 0).reshape(-1, k)
                for x, k in ((ours[0], 5), (theirs[0], 5), (ours[1], 4), (theirs[1], 4))
            )
            counts = labels[image][first : first + len(s)] >= 0
            first += len(s)
            cls = cls + quality_bce(s, t)[counts].sum()
            transform = student.box2box_transform
            boxes = [transform.apply_deltas(d, level_anchors.tensor) for d in (sd, td)]
            box = box + weighted_giou(*boxes, t.sigmoid().max(dim=1).values * counts)
    torch.testing.assert_close(loss, (cls + 2 * box) / normalizer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.metrics["distill/dense_head_box_weighted"],
        2 * box.detach() / normalizer,
        rtol=1e-4,
        atol=1e-5,
    )


def test_dense_predictions_are_ordered_as_the_anchors_are() -> None:
    model = detector("retinanet")
    cells, k, a = [(4, 6), (2, 3)], 5, 9
    model.anchor_generator.strides = model.anchor_generator.strides[:2]
    model.anchor_generator.cell_anchors._buffers = dict(
        list(model.anchor_generator.cell_anchors._buffers.items())[:2]
    )
    logits = [numbers(2, a * k, *size, seed=i) for i, size in enumerate(cells)]
    deltas = [numbers(2, a * 4, *size, seed=5 + i) for i, size in enumerate(cells)]
    found = dense_predictions(model, (logits, deltas))
    rows = sum(h * w for h, w in cells) * a
    assert found.logits.shape == (2, rows, k) and found.deltas.shape == (2, rows, 4)
    row = 4 * 6 * a + (1 * 3 + 2) * a + 7  # of the second level: its cell (1, 2), anchor 7
    assert found.logits[1, row].tolist() == logits[1][1, 7 * k : 8 * k, 1, 2].tolist()
    assert found.deltas[1, row].tolist() == deltas[1][1, 28:32, 1, 2].tolist()
    assert sum(len(x) for x in found.anchors) == rows


def test_anchor_targets_without_ground_truth_is_an_error() -> None:
    with pytest.raises(ValueError, match="instances"):
        anchor_targets(None, [], DistillBatch([(32, 32)]))


def test_anchor_targets_are_the_detectors_own() -> None:
    model = detector("retinanet")
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])))
    instances.gt_classes = torch.tensor([3])
    anchors = [
        Boxes(torch.tensor([[8.0, 8, 40, 40], [50, 50, 60, 60], [8, 8, 40, 22.5]])),
        Boxes(torch.tensor([[8.0, 8, 40, 36]])),
    ]
    found, _ = anchor_targets(model, anchors, DistillBatch([(64, 64)], [instances]))
    # IoU 1; 0, background; 0.45, between RetinaNet's thresholds, ignored; 0.88.
    assert found.tolist() == [[3, 5, -1, 3]]


def test_anchor_normalizer_is_the_detectors_running_mean_or_the_number_of_positives() -> None:
    positive = torch.tensor([[True, False, True], [False, False, True]])
    model = nn.Module()
    assert int(anchor_normalizer(model, positive)) == 3
    assert int(anchor_normalizer(model, positive & False)) == 1
    model.loss_normalizer = 90.4
    assert anchor_normalizer(model, positive & False) == 90.4
