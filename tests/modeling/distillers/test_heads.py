"""Distillation of heads: the functions against plain loops, the distillers on small detectors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances
from torch import nn

from ssim_kd.modeling import (
    DenseHeadDistiller,
    DistillBatch,
    DistilledDetector,
    Distiller,
    RCNNHeadDistiller,
    Tap,
    build_distillers,
)
from ssim_kd.modeling.distillers.dense_heads import (
    DensePredictions,
    anchor_labels,
    anchor_normalizer,
    decode,
    dense_predictions,
    quality_bce,
    weighted_giou,
)
from ssim_kd.modeling.distillers.roi_heads import softmax_kd, top_class_delta_l1
from tests.helpers import (
    STUDENT_FPN,
    TEACHER_FPN,
    build,
    full_config,
    gradients,
    make_batch,
    stock_config,
    train_losses,
)

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


def make_fcos(fpn: int, *, seed: int, classes: int = 5) -> FCOS:
    """An FCOS, which YAML configs do not know, on a small RetinaNet's backbone."""
    backbone = build(stock_config("retinanet", fpn=fpn), seed=seed).backbone
    names = ["p3", "p4", "p5", "p6", "p7"]
    shapes = [backbone.output_shape()[name] for name in names]
    torch.manual_seed(seed)
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, conv_dims=[16], num_classes=classes, norm=""),
        head_in_features=names,
        num_classes=classes,
        pixel_mean=[100.0, 100.0, 100.0],
        pixel_std=[57.0, 57.0, 57.0],
    )


def make_detector(kind: str, *opts: Any, fpn: int = STUDENT_FPN, seed: int = 0) -> Any:
    if kind == "fcos":
        return make_fcos(fpn, seed=seed)
    return build(stock_config(kind, *opts, fpn=fpn), seed=seed)


def make_teacher(kind: str, *opts: Any) -> Any:
    return make_detector(kind, *opts, fpn=TEACHER_FPN, seed=1)


def distil(student: Any, teacher: Any, distiller: Distiller) -> DistilledDetector:
    return DistilledDetector(student=student, teacher=teacher, distillers=[distiller])


DISTILLERS = {
    "faster": RCNNHeadDistiller,
    "mask": RCNNHeadDistiller,
    "retinanet": DenseHeadDistiller,
    "fcos": DenseHeadDistiller,
}
KINDS = list(DISTILLERS)


def without_boxes(batch: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """The batch, the first images of which show nothing."""
    for record in batch[:images]:
        record["instances"] = record["instances"][:0]
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_trains_the_student_and_leaves_the_teacher_as_it_was(kind) -> None:
    student, teacher = make_detector(kind), make_teacher(kind)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    model = distil(student, teacher, DISTILLERS[kind]())
    losses = train_losses(model)
    assert losses["loss_distill"] > 0 and torch.isfinite(losses["loss_distill"])
    losses["loss_distill"].backward()
    reached = gradients(student)
    head = "roi_heads.box_" if DISTILLERS[kind] is RCNNHeadDistiller else "head."
    for prefix in (head, "backbone.fpn_output"):
        assert any(g.any() for name, g in reached.items() if name.startswith(prefix)), prefix
    assert all(torch.isfinite(gradient).all() for gradient in reached.values())
    # Neither where to look nor masks are compared.
    others = ("proposal_generator.", "roi_heads.mask_", "head.ctrness")
    assert not [name for name in reached if name.startswith(others)]

    assert not list(model.distillers.parameters())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    after = teacher.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    name = model.distillers[next(iter(model.distillers))].name
    assert set(model.metrics) == {
        f"distill/{name}_{part}{end}" for part in ("cls", "box") for end in ("", "_weighted")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_is_the_minimum(kind) -> None:
    student = make_detector(kind)
    if DISTILLERS[kind] is DenseHeadDistiller:
        # Untrained ones predict boxes without area as well, of which even equal ones have no IoU.
        nn.init.normal_(student.head.bbox_pred.weight, std=1e-4)
        nn.init.constant_(student.head.bbox_pred.bias, 1.0)
    # The teacher's norms are in evaluation mode; the student's must be, to see the same.
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
            module.training = False
    model = distil(student, copy.deepcopy(student), DISTILLERS[kind]())
    loss = train_losses(model)["loss_distill"]
    assert abs(float(loss.detach())) < 1e-4
    loss.backward()
    assert all(float(g.abs().max()) < 1e-3 for g in gradients(student).values())


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_images_without_boxes_are_distilled(kind, images) -> None:
    model = distil(make_detector(kind), make_teacher(kind), DISTILLERS[kind]())
    losses = train_losses(model, without_boxes(make_batch(), images))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_distill"] > 0
    losses["loss_distill"].backward()
    assert all(torch.isfinite(g).all() for g in gradients(model.student).values())


def test_rcnn_head_distiller_asks_the_teacher_about_the_students_proposals() -> None:
    student, teacher = make_detector("faster"), make_teacher("faster")
    model = distil(student, teacher, RCNNHeadDistiller(temperature=2.0, cls_weight=3.0))
    twin = make_teacher("faster").eval()
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
    student, teacher = make_detector(kind), make_teacher(kind)
    model = distil(student, teacher, DenseHeadDistiller(box_weight=2.0))
    twin, batch = make_teacher(kind).eval(), make_batch()
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
    detector = make_detector("retinanet")
    cells, k, a = [(4, 6), (2, 3)], 5, 9
    detector.anchor_generator.strides = detector.anchor_generator.strides[:2]
    detector.anchor_generator.cell_anchors._buffers = dict(
        list(detector.anchor_generator.cell_anchors._buffers.items())[:2]
    )
    logits = [numbers(2, a * k, *size, seed=i) for i, size in enumerate(cells)]
    deltas = [numbers(2, a * 4, *size, seed=5 + i) for i, size in enumerate(cells)]
    found = dense_predictions(detector, (logits, deltas))
    rows = sum(h * w for h, w in cells) * a
    assert found.logits.shape == (2, rows, k) and found.deltas.shape == (2, rows, 4)
    row = 4 * 6 * a + (1 * 3 + 2) * a + 7  # of the second level: its cell (1, 2), anchor 7
    assert found.logits[1, row].tolist() == logits[1][1, 7 * k : 8 * k, 1, 2].tolist()
    assert found.deltas[1, row].tolist() == deltas[1][1, 28:32, 1, 2].tolist()
    assert sum(len(x) for x in found.anchors) == rows


def test_anchor_labels_without_ground_truth_is_an_error() -> None:
    with pytest.raises(ValueError, match="instances"):
        anchor_labels(None, [], DistillBatch([(32, 32)]))


def test_anchor_labels_are_the_detectors_own() -> None:
    detector = make_detector("retinanet")
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])))
    instances.gt_classes = torch.tensor([3])
    anchors = [
        Boxes(torch.tensor([[8.0, 8, 40, 40], [50, 50, 60, 60], [8, 8, 40, 22.5]])),
        Boxes(torch.tensor([[8.0, 8, 40, 36]])),
    ]
    found = anchor_labels(detector, anchors, DistillBatch([(64, 64)], [instances]))
    # IoU 1; 0, background; 0.45, between RetinaNet's thresholds, ignored; 0.88.
    assert found.tolist() == [[3, 5, -1, 3]]


def test_anchor_normalizer_is_the_detectors_running_mean_or_the_number_of_positives() -> None:
    positive = torch.tensor([[True, False, True], [False, False, True]])
    detector = nn.Module()
    assert int(anchor_normalizer(detector, positive)) == 3
    assert int(anchor_normalizer(detector, positive & False)) == 1
    detector.loss_normalizer = 90.4
    assert anchor_normalizer(detector, positive & False) == 90.4


# What does not fit is refused when the model is built

RETINA_3 = ("MODEL.RETINANET.NUM_CLASSES", 3)
FASTER_3 = ("MODEL.ROI_HEADS.NUM_CLASSES", 3)
ONE_ANCHOR = (
    "MODEL.ANCHOR_GENERATOR.SIZES",
    [[8], [16], [32], [64], [128]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
    [[1.0]],
)


@pytest.mark.parametrize(
    ("student", "teacher", "distiller", "parts"),
    [
        (["faster", *FASTER_3], ["faster"], RCNNHeadDistiller, ("3", "5", "classes")),
        (["retinanet"], ["retinanet", *RETINA_3], DenseHeadDistiller, ("5", "3", "classes")),
        (["cascade"], ["faster"], RCNNHeadDistiller, ("student", "CascadeROIHeads")),
        (["faster"], ["cascade"], RCNNHeadDistiller, ("teacher", "CascadeROIHeads")),
        (["c4"], ["faster"], RCNNHeadDistiller, ("student", "Res5ROIHeads")),
        (["retinanet"], ["faster"], RCNNHeadDistiller, ("student", "RetinaNet")),
        (["faster"], ["retinanet"], RCNNHeadDistiller, ("teacher", "RetinaNet")),
        (["faster"], ["retinanet"], DenseHeadDistiller, ("student", "GeneralizedRCNN")),
        (["retinanet"], ["faster"], DenseHeadDistiller, ("teacher", "GeneralizedRCNN")),
        (["retinanet"], ["fcos"], DenseHeadDistiller, ("anchors a cell", "9", "1")),
        (["retinanet", *ONE_ANCHOR], ["fcos"], DenseHeadDistiller, ("box coding", "Linear")),
        (
            ["retinanet", "MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5"], *ONE_ANCHOR[2:],
             "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128]]],
            ["retinanet", *ONE_ANCHOR], DenseHeadDistiller, ("anchors a cell",),
        ),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_fit_is_refused(student, teacher, distiller, parts) -> None:
    with pytest.raises(ValueError) as caught:
        distil(make_detector(*student), make_teacher(*teacher), distiller())
    message = str(caught.value)
    assert distiller.__name__ in message
    assert all(part in message for part in parts), message


def test_check_dense_heads_of_other_strides_names_them() -> None:
    levels = [("p3", "p4"), ("p4", "p5")]
    student, teacher = (
        make(
            "retinanet",
            *("MODEL.RETINANET.IN_FEATURES", list(names)),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]]),
        )
        for make, names in zip((make_detector, make_teacher), levels, strict=True)
    )
    with pytest.raises(ValueError) as caught:
        distil(student, teacher, DenseHeadDistiller())
    assert "strides" in str(caught.value) and "[8, 16] and [16, 32]" in str(caught.value)


@pytest.mark.parametrize("name", ["RCNNHeadDistiller", "DenseHeadDistiller"])
def test_head_distiller_takes_its_weights_from_the_config(name) -> None:
    cfg = full_config()
    cfg.merge_from_list(["MODEL.DISTILL.NAME", name, "MODEL.DISTILL.HEAD.CLS_WEIGHT", 0.25])
    (distiller,) = build_distillers(cfg)
    distiller.resolve()
    assert distiller.scalar_weights == {"cls": 0.25, "box": 1.0}
    assert distiller.weight(0.0) == 1.0 and distiller.needs_teacher_heads
