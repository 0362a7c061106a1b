"""CrossKD and BCKD: against loops over anchors, and what may go wrong around them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from ssim_kd.modeling import DistilledDetector, FrozenTeacher
from ssim_kd.projects.crosskd import CrossKDDistiller, CrossKDRCNNDistiller
from ssim_kd.projects.crosskd.distiller import activation_after, match_statistics, weighted_iou
from tests.helpers import (
    bfloat16_without_onednn,
    build,
    build_fcos,
    distilled_config,
    gradients,
    make_batch,
    stock_config,
    train_losses,
)

# The last levels are of 1 x 1 cells.
SIZES = ((64, 96), (48, 64))
TWO = ("MODEL.RETINANET.NUM_CONVS", 2)


def detector(kind: str, width: int, seed: int, *opts: Any) -> nn.Module:
    if kind != "fcos":
        return build(stock_config(kind, *opts, fpn=width), seed=seed)
    return build_fcos(fpn=width, seed=seed)


def distilled(kind: str, distiller: nn.Module, *opts: Any, teacher: Any = None):
    """Student and teacher of other widths, both with towers of two convolutions."""
    student = detector(kind, 32, 0, *TWO, *opts)
    teacher = detector(kind, 64, 1, *TWO, *opts) if teacher is None else teacher
    for layer in ("cls_score", "bbox_pred"):
        # Untrained heads predict nearly the same everywhere: here they do not.
        for model in (student, teacher):
            if hasattr(model, "head"):
                nn.init.normal_(getattr(model.head, layer).weight, std=0.1)
    return DistilledDetector(
        student=student, teacher=FrozenTeacher(teacher), distillers=[distiller], max_iter=10
    )


# By hand


def test_activation_after_counts_convolutions() -> None:
    conv, norm, relu = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()
    tower = nn.Sequential(conv, norm, relu, conv, norm, relu)
    assert [activation_after(tower, depth) for depth in (1, 2)] == [2, 5]
    retinanet = nn.Sequential(*[conv, relu] * 4)
    assert activation_after(retinanet, 3) == 5  # after cls_subnet[4]
    with pytest.raises(ValueError, match=r"depth is 3; expected 1 to 2"):
        activation_after(tower, 3)


def test_match_statistics_worked_by_hand() -> None:
    # Student 1, 3 (mean 2, variance 2); teacher 10, 14 (mean 12, variance 8): twice as far apart.
    student = torch.tensor([[[[1.0, 3.0, 100.0]]]])
    teacher = torch.tensor([[[[10.0, 14.0, -7.0]]]])
    mask = torch.tensor([[[True, True, False]]])
    found = match_statistics(student, teacher, mask)
    torch.testing.assert_close(found[..., :2], torch.tensor([[[[10.0, 14.0]]]]))


def test_match_statistics_of_one_cell_and_of_a_constant() -> None:
    for shape in ((1, 2, 1, 1), (2, 2, 3, 3)):
        student = torch.full(shape, 0.3, requires_grad=True)
        teacher = torch.randn(shape)
        mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
        found = match_statistics(student, teacher, mask)
        torch.testing.assert_close(found, teacher.mean(dim=(0, 2, 3), keepdim=True).expand(shape))
        (found * torch.randn(shape)).sum().backward()
        assert not student.grad.any()


def test_weighted_iou_worked_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    others = torch.tensor([[0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    # IoU 8 / 16, 1, and boxes without an area.
    weights = torch.tensor([3.0, 5.0, 0.5])
    expected = 3 * math.log(2) + 0.5 * -math.log(1e-6)
    assert float(weighted_iou(boxes, others, weights)) == pytest.approx(expected, rel=1e-5)


# Against loops


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def giou_loss(a: Any, b: Any) -> float:
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - overlap / (union + 1e-7) + (hull - union) / (hull + 1e-7)


def iou_loss(a: Any, b: Any) -> float:
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return -math.log(max(overlap / max(union, 1e-6), 1e-6))


def box_of(kind: str, anchor: Any, delta: Any) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    if kind == "fcos":
        left, top, right, bottom = (max(d, 0.0) * width for d in delta)
        return [x - left, y - top, x + right, y + bottom]
    x, y = x + delta[0] * width, y + delta[1] * height
    width *= math.exp(min(delta[2], math.log(1000 / 16)))
    height *= math.exp(min(delta[3], math.log(1000 / 16)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def by_anchor(levels: list[Any], k: int) -> Any:
    """(N, A k, H, W) by level as (N, R, k): row, column, anchor, one after the other."""
    n = len(levels[0])
    images = []
    for i in range(n):
        rows = []
        for x in levels:
            x = x[i].detach().double().numpy()
            a = x.shape[0] // k
            for row in range(x.shape[1]):
                for column in range(x.shape[2]):
                    rows += [x[j * k : (j + 1) * k, row, column] for j in range(a)]
        images.append(np.stack(rows))
    return np.stack(images)


def expected_losses(model: DistilledDetector, kind: str, inputs: list[Any]) -> tuple[float, float]:
    """Both parts for the present batch, float64, one anchor at a time."""
    (distiller,) = model.distillers.values()
    student, teacher = model.student, model.teacher.model
    sizes = [x["image"].shape[1:] for x in inputs]
    features = student.backbone(student.preprocess_image(inputs).tensor)
    theirs = teacher.backbone(teacher.preprocess_image(inputs).tensor)
    features, theirs = list(features.values()), list(theirs.values())
    strides = [8, 16, 32, 64, 128]
    own = list(teacher.head(theirs)[:2])
    if distiller.depth == 0:
        crossed = list(student.head(features)[:2])
    else:
        crossed = []
        convs = 2 if kind == "fcos" else 1  # up to the pre-activation, after FCOS' norm
        for tower, score in (("cls_subnet", "cls_score"), ("bbox_subnet", "bbox_pred")):
            levels = []
            for x, t, stride in zip(features, theirs, strides, strict=True):
                s = getattr(student.head, tower)[:convs](x)
                s = distiller.adapters[tower](s).detach().double().numpy()
                t = getattr(teacher.head, tower)[:convs](t).detach().double().numpy()
                out = np.empty_like(s)
                for c in range(s.shape[1]):
                    inside = [
                        (i, y, z)
                        for i in range(len(s))
                        for y in range(s.shape[2])
                        for z in range(s.shape[3])
                        if y * stride < sizes[i][0] and z * stride < sizes[i][1]
                    ]
                    ours = [s[i, c, y, z] for i, y, z in inside]
                    his = [t[i, c, y, z] for i, y, z in inside]
                    deviations = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in (ours, his)]
                    scaled = (s[:, c] - np.mean(ours)) / (deviations[0] + 1e-6)
                    out[:, c] = scaled * deviations[1] + np.mean(his)
                y = torch.tensor(out, dtype=torch.float32)
                y = getattr(teacher.head, tower)[convs:](y)
                levels.append(getattr(teacher.head, score)(y))
            crossed.append(levels)
    logits, soft = by_anchor(crossed[0], 5), by_anchor(own[0], 5)
    deltas, soft_deltas = by_anchor(crossed[1], 4), by_anchor(own[1], 4)

    anchors = student.anchor_generator(features)
    cells = [
        (y * s, x * s)
        for s, m, a in zip(strides, features, student.anchor_generator.num_anchors, strict=True)
        for y in range(m.shape[2])
        for x in range(m.shape[3])
        for _ in range(a)
    ]
    labels, gt = student.label_anchors(anchors, [x["instances"] for x in inputs])
    anchors = Boxes.cat(anchors).tensor.double().numpy()
    cls = box = 0.0
    centerness = []
    for i in range(len(inputs)):
        for r, (y, x) in enumerate(cells):
            if y >= sizes[i][0] or x >= sizes[i][1]:
                continue
            label = int(labels[i][r])
            p, q = sigmoid(logits[i, r]), sigmoid(soft[i, r])
            if label >= 0:
                bce = -(q * np.log(p) + (1 - q) * np.log(1 - p))
                cls += float((abs(p - q) * bce).sum())
            weight = max(abs(p - q)) if distiller.depth == 0 else max(q) * (label >= 0)
            pair = [box_of(kind, anchors[r], d) for d in (deltas[i, r], soft_deltas[i, r])]
            box += weight * (iou_loss if kind == "fcos" else giou_loss)(*pair)
            if kind == "fcos" and 0 <= label < 5:
                b = gt[i].tensor[r].double().numpy()
                cx, cy = (anchors[r][:2] + anchors[r][2:]) / 2
                left, top, right, bottom = cx - b[0], cy - b[1], b[2] - cx, b[3] - cy
                centerness.append(
                    math.sqrt(
                        min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
                    )
                )
    n = student.loss_normalizer
    return cls / n, box / n / (np.mean(centerness) if kind == "fcos" else 1)


@pytest.mark.parametrize(("kind", "depth"), [("retinanet", 0), ("retinanet", 1), ("fcos", 1)])
def test_crosskd_equals_a_loop_over_anchors(kind, depth) -> None:
    model = distilled(kind, CrossKDDistiller(depth=depth, cls_weight=0.4, box_weight=0.75))
    name = "crosskd" if depth else "bckd"
    inputs = make_batch(SIZES)
    losses = train_losses(model, inputs)
    with torch.no_grad(), EventStorage(0):
        cls, box = expected_losses(model, kind, inputs)
    assert float(model.metrics[f"distill/{name}_cls"]) == pytest.approx(cls, rel=1e-3)
    assert float(model.metrics[f"distill/{name}_box"]) == pytest.approx(box, rel=1e-3)
    total = losses["loss_distill"]
    assert float(total) == pytest.approx(0.4 * cls + 0.75 * box, rel=1e-3)

    total.backward()
    own = gradients(model.student)
    assert all(torch.isfinite(g).all() for g in own.values())
    assert own["backbone.fpn_output3.weight"].any() and own["head.cls_subnet.0.weight"].any()
    # Behind the crossing the student's own head has no part in it.
    assert (own.get("head.cls_score.weight") is None) == (depth > 0)
    adapters = gradients(model.distillers)
    assert (len(adapters) == 4) == (depth > 0)
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())


@pytest.mark.parametrize("depth", [0, 2])
def test_crosskd_of_twins_is_0(depth) -> None:
    student = detector("retinanet", 32, 0, *TWO)
    model = DistilledDetector(
        student=student,
        teacher=FrozenTeacher(copy.deepcopy(student)),
        distillers=[CrossKDDistiller(depth=depth, adapter="none")],
        max_iter=10,
    )
    model.train()
    model.student.eval()
    model.student.training = True  # the losses of training on the running statistics
    torch.manual_seed(0)
    with EventStorage(0):
        loss = model(make_batch(SIZES))["loss_distill"]
    assert 0 <= float(loss) < 1e-4


# What may go wrong


def bad_batches() -> dict[str, list[Any]]:
    one = make_batch(SIZES)
    without = make_batch(SIZES)
    without[0]["instances"] = without[0]["instances"][[]]
    none = make_batch(SIZES[:1])
    none[0]["instances"] = none[0]["instances"][[]]
    flat = make_batch(SIZES)
    flat[1]["instances"].gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 8.0, 30.0]]))
    return {"one": one[:1], "half without boxes": without, "no box": none, "flat": flat}


@pytest.mark.parametrize("case", list(bad_batches()))
@pytest.mark.parametrize("kind", ["bckd", "crosskd", "rcnn"])
def test_crosskd_survives(kind, case) -> None:
    if kind == "rcnn":
        model = distilled("faster", CrossKDRCNNDistiller())
    else:
        model = distilled("retinanet", CrossKDDistiller(depth=int(kind == "crosskd")))
    batch = bad_batches()[case]
    with bfloat16_without_onednn(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = train_losses(model, batch)["loss_distill"]
    assert torch.isfinite(loss) and loss > 0 and loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    # A batch without boxes weighs no more than others: the detector's running mean divides.
    if case == "no box" and kind != "rcnn":
        assert model.student.loss_normalizer > 50


def test_bckd_sums_over_images() -> None:
    model = distilled("retinanet", CrossKDDistiller(depth=0), "MODEL.RESNETS.NORM", "FrozenBN")
    batch = make_batch(((64, 64), (64, 64)))
    batch[1]["image"] = batch[1]["image"].flip(2)
    losses = []
    for images in (batch, batch[:1], batch[1:]):
        loss = train_losses(model, images)["loss_distill"].detach()
        losses.append(float(loss) * model.student.loss_normalizer)
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-3)


@pytest.mark.parametrize(
    ("student", "teacher", "distiller", "named"),
    [
        ("faster", "faster", CrossKDDistiller(), ("CrossKDDistiller", "GeneralizedRCNN")),
        ("retinanet", "faster", CrossKDDistiller(), ("teacher", "GeneralizedRCNN")),
        ("retinanet", "retinanet", CrossKDRCNNDistiller(), ("StandardROIHeads", "RetinaNet")),
        ("faster", "cascade", CrossKDRCNNDistiller(), ("teacher", "CascadeROIHeads")),
        ("retinanet", "retinanet", CrossKDDistiller(depth=3), ("depth is 3", "1 to 2")),
        ("retinanet", "fcos", CrossKDDistiller(), ("anchors",)),
    ],
)
def test_crosskd_refuses_what_it_cannot_serve(student, teacher, distiller, named) -> None:
    teacher = detector(teacher, 64, 1, *TWO)
    with pytest.raises(ValueError) as caught:
        distilled(student, distiller, teacher=teacher)
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize(
    ("kind", "distiller", "key"),
    [
        ("retinanet", CrossKDDistiller(depth=1), "MODEL.RETINANET.NUM_CLASSES"),
        ("faster", CrossKDRCNNDistiller(), "MODEL.ROI_HEADS.NUM_CLASSES"),
    ],
)
def test_crosskd_needs_equal_classes(kind, distiller, key) -> None:
    with pytest.raises(ValueError, match="5 classes and the teacher 7"):
        distilled(kind, distiller, teacher=detector(kind, 64, 1, *TWO, key, 7))


def test_crosskd_rcnn_is_the_teachers_head_on_both_maps() -> None:
    model = distilled("faster", CrossKDRCNNDistiller())
    calls = []
    model.student.roi_heads.box_pooler.register_forward_hook(lambda *x: calls.append(x))
    inputs = make_batch(SIZES)
    total = train_losses(model, inputs)["loss_distill"]
    teacher = model.teacher.model
    maps = teacher.backbone(teacher.preprocess_image(inputs).tensor)
    ours, boxes = calls[0][1]
    adapters = model.distillers["crosskd"].adapters
    levels = ("p2", "p3", "p4", "p5")
    crossed = [adapters[k](x) for k, x in zip(levels, ours, strict=True)]
    found = []
    for features in (crossed, [maps[k] for k in levels]):
        heads = teacher.roi_heads
        x = heads.box_head(heads.box_pooler(features, boxes))
        found.append([y.detach().double().numpy() for y in heads.box_predictor(x)])
    (logits, deltas), (soft, soft_deltas) = found
    kl = l1 = weights = 0.0
    for s, t, d, e in zip(logits, soft, deltas, soft_deltas, strict=True):
        p, q = (np.exp(x / 3) / np.exp(x / 3).sum() for x in (s, t))
        kl += 9 * float((q * np.log(q / p)).sum()) / len(logits)
        q = np.exp(t) / np.exp(t).sum()
        k = int(np.argmax(q[:5]))
        l1 += q[k] * np.abs(d[4 * k : 4 * k + 4] - e[4 * k : 4 * k + 4]).sum()
        weights += q[k]
    expected = 0.5 * kl + l1 / (4 * weights)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    total.backward()
    assert model.student.backbone.fpn_output2.weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())
    # The student's own box head has no part in it.
    assert not any(name.startswith("roi_heads") for name in gradients(model.student))


# By a config


@pytest.mark.parametrize(
    ("kind", "terms", "names"),
    [
        (
            "retinanet",
            [
                ["PKDDistiller", "LOSS_WEIGHT", 10.0, "IN_FEATURES", ["p3", "p4"]],
                ["CrossKDDistiller", "CROSSKD.DEPTH", 1],
            ],
            ["pkd", "crosskd"],
        ),
        (
            "faster",
            [
                ["SSIMDistiller", "LOSS_WEIGHT", 4.0],
                ["CrossKDRCNNDistiller", "HEAD.TEMPERATURE", 3.0, "HEAD.CLS_WEIGHT", 0.5],
            ],
            ["ssim", "crosskd"],
        ),
    ],
)
def test_crosskd_beside_another_term(kind, terms, names, tmp_path) -> None:
    cfg = distilled_config(kind, kind, tmp_path / "unread.pth", "MODEL.DISTILL.LOSS_WEIGHT", 1.0)
    cfg.MODEL.DISTILL.TERMS = terms
    model = build(cfg)
    assert list(model.distillers) == names
    if kind == "faster":
        assert model.distillers["crosskd"].temperature == 3.0
    weights = stock_config(kind, fpn=48)
    model.teacher._load = lambda _: (build(weights, seed=1), "")
    losses = train_losses(model, make_batch(SIZES))
    losses["loss_distill"].backward()
    assert all(model.metrics[f"distill/{name}_weighted"] > 0 for name in names)
    assert any("adapters" in name for name in gradients(model.distillers["crosskd"]))
    assert not any("crosskd" in name for name in model.student.state_dict())
    assert any("distillers.crosskd.adapters" in name for name in model.state_dict())


def test_a_lazy_config_takes_a_step() -> None:
    folder = Path(__file__).parents[1] / "configs"
    config = LazyConfig.load(str(folder / "crosskd_fcos_R_50_w4_demo.py"))
    teacher = LazyConfig.load(str(folder / "teacher_fcos_R_50_w8_demo.py"))
    model = instantiate(config.model)
    model.teacher._load = lambda _: (instantiate(teacher.model), "")
    losses = train_losses(model, make_batch(SIZES))
    sum(losses.values()).backward()
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "loss_distill"}
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_distill"] > 0
    assert gradients(model.distillers)["crosskd.adapters.cls_subnet.weight"].any()
