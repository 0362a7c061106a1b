"""CrossKD and BCKD."""

from __future__ import annotations

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

from ssim_kd.modeling import DistilledDetector
from ssim_kd.projects.crosskd import CrossKDDistiller, CrossKDRCNNDistiller
from ssim_kd.projects.crosskd.distiller import activation_after, match_statistics, weighted_iou
from tests.helpers import gradients, make_batch, train_losses
from tests.projects.float64 import number, softmax
from tests.projects.heads import MethodOfHeads

# The last levels are of 1 x 1 cells.
SIZES = ((64, 96), (48, 64))


def boxes_of(kind: str, anchors: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """(R, 4) in pixels."""
    size, center = anchors[:, 2:] - anchors[:, :2], (anchors[:, :2] + anchors[:, 2:]) / 2
    if kind == "fcos":
        sides = deltas.clip(0) * size[:, :1]
        return np.concatenate([center - sides[:, :2], center + sides[:, 2:]], axis=1)
    center = center + deltas[:, :2] * size
    size = size * np.exp(np.minimum(deltas[:, 2:], math.log(1000 / 16)))
    return np.concatenate([center - size / 2, center + size / 2], axis=1)


def box_losses(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - GIoU, of FCOS -log IoU, by pair."""
    corners = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    inner = (corners[1] - corners[0]).clip(0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    if kind == "fcos":
        return -np.log((inner / union.clip(1e-6)).clip(1e-6))
    hull = (np.maximum(a[:, 2:], b[:, 2:]) - np.minimum(a[:, :2], b[:, :2])).prod(1)
    return 1 - inner / (union + 1e-7) + (hull - union) / (hull + 1e-7)


def by_anchor(levels: list[Any], k: int) -> np.ndarray:
    """(N, A k, H, W) by level as (N, R, k): row, column, anchor, one after the other."""
    found = [number(x).reshape(len(x), -1, k, *x.shape[2:]) for x in levels]
    return np.concatenate(
        [x.transpose(0, 3, 4, 1, 2).reshape(len(x), -1, k) for x in found], axis=1
    )


def crossed(model: DistilledDetector, features: list, theirs: list, masks: list) -> list[list]:
    """Logits and deltas that the teacher's head predicts of the student's maps, by level."""
    (distiller,) = model.distillers.values()
    student, teacher, found = model.student.head, model.teacher.model.head, []
    for tower, score in (("cls_subnet", "cls_score"), ("bbox_subnet", "bbox_pred")):
        ours, his = getattr(student, tower), getattr(teacher, tower)
        # Up to the first activation: of FCOS, after its norm.
        convs = next(i for i, layer in enumerate(ours) if isinstance(layer, nn.ReLU))
        levels = []
        for x, t, mask in zip(features, theirs, masks, strict=True):
            s, t = number(distiller.adapters[tower](ours[:convs](x))), number(his[:convs](t))
            rows = [np.moveaxis(y, 1, -1)[mask] for y in (s, t)]
            (mean, std), (target_mean, target_std) = (
                (y.mean(0)[:, None, None], y.std(0, ddof=int(len(y) > 1))[:, None, None])
                for y in rows
            )
            y = (s - mean) / (std + 1e-6) * target_std + target_mean
            y = his[convs:](torch.tensor(y, dtype=torch.float32))
            levels.append(getattr(teacher, score)(y))
        found.append(levels)
    return found


def expected_losses(model: DistilledDetector, kind: str, inputs: list) -> tuple[float, float]:
    """Both parts for the present batch."""
    (distiller,) = model.distillers.values()
    student, teacher = model.student, model.teacher.model
    features, theirs = (
        list(m.backbone(m.preprocess_image(inputs).tensor).values()) for m in (student, teacher)
    )
    masks = []
    for x, stride in zip(features, (8, 16, 32, 64, 128), strict=True):
        y, z = (np.arange(n) * stride for n in x.shape[2:])
        sizes = [image["image"].shape[1:] for image in inputs]
        masks.append(np.stack([(y < h)[:, None] & (z < w) for h, w in sizes]))
    own = teacher.head(theirs)[:2]
    outputs = crossed(model, features, theirs, masks) if distiller.depth else student.head(features)
    logits, deltas = by_anchor(outputs[0], 5), by_anchor(outputs[1], 4)
    soft, soft_deltas = by_anchor(own[0], 5), by_anchor(own[1], 4)
    count = student.anchor_generator.num_anchors[0]
    inside = np.concatenate([m.reshape(len(m), -1).repeat(count, 1) for m in masks], axis=1)
    anchors = student.anchor_generator(features)
    labels, gt = student.label_anchors(anchors, [x["instances"] for x in inputs])
    anchors = number(Boxes.cat(anchors).tensor)
    cls = box = 0.0
    centerness: list[float] = []
    for i in range(len(inputs)):
        label, counts = labels[i].numpy(), inside[i]
        p, q = (1 / (1 + np.exp(-x[i])) for x in (logits, soft))
        bce = -(q * np.log(p) + (1 - q) * np.log(1 - p))
        cls += (abs(p - q) * bce).sum(1)[counts & (label >= 0)].sum()
        if distiller.depth:
            weights = q.max(1) * (counts & (label >= 0))
        else:
            weights = abs(p - q).max(1) * counts
        pair = (boxes_of(kind, anchors, x[i]) for x in (deltas, soft_deltas))
        box += (weights * box_losses(kind, *pair)).sum()
        if kind == "fcos":
            positive = counts & (label >= 0) & (label < 5)
            b = number(gt[i].tensor)[positive]
            center = (anchors[:, :2] + anchors[:, 2:])[positive] / 2
            sides = np.stack([center - b[:, :2], b[:, 2:] - center])
            centerness += list(np.sqrt((sides.min(0) / sides.max(0)).prod(1)))
    n = student.loss_normalizer
    return cls / n, box / n / (np.mean(centerness) if kind == "fcos" else 1)


class TestCrossKD(MethodOfHeads):
    method = CrossKDDistiller
    options = {"depth": 1, "cls_weight": 0.4, "box_weight": 0.75}
    weights = (None, 1.0)
    kinds = ("retinanet", "fcos")
    at_rest, steep = kinds, True
    bad = [
        *(("depth", value, "CROSSKD.DEPTH") for value in (-1, 1.5, True)),
        ("part_weights.cls", -1.0, "HEAD.CLS_WEIGHT"),
    ]
    refused = [
        ("faster", "faster", ("CrossKDDistiller", "GeneralizedRCNN")),
        ("retinanet", "faster", ("teacher", "GeneralizedRCNN")),
        ("retinanet", "fcos", ("anchors",)),
    ]
    reaches = ("head.cls_subnet.0.weight",)
    # After the crossing the student's own head has no part in it.
    spares = ("head.cls_score", "head.bbox_pred", "head.ctrness")

    def test_by_hand(self) -> None:
        # Student 1, 3 (mean 2, variance 2); teacher 10, 14 (mean 12, variance 8): twice as far
        # apart.
        student = torch.tensor([[[[1.0, 3.0, 100.0]]]])
        teacher = torch.tensor([[[[10.0, 14.0, -7.0]]]])
        found = match_statistics(student, teacher, torch.tensor([[[True, True, False]]]))
        torch.testing.assert_close(found[..., :2], torch.tensor([[[[10.0, 14.0]]]]))
        # IoU 8 / 16, 1, and boxes without an area.
        boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
        others = torch.tensor([[0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
        expected = 3 * math.log(2) + 0.5 * -math.log(1e-6)
        found = weighted_iou(boxes, others, torch.tensor([3.0, 5.0, 0.5]))
        assert float(found) == pytest.approx(expected, rel=1e-5)

    def test_the_formula_in_float64(self) -> None:
        for kind in self.kinds:
            model, inputs = self.model(kind), make_batch(SIZES)
            total = train_losses(model, inputs)["loss_distill"]
            with torch.no_grad(), EventStorage(0):
                cls, box = expected_losses(model, kind, inputs)
            (name,) = model.distillers
            assert float(model.metrics[f"distill/{name}_cls"]) == pytest.approx(cls, rel=1e-3)
            assert float(model.metrics[f"distill/{name}_box"]) == pytest.approx(box, rel=1e-3)
            assert float(total.detach()) == pytest.approx(0.4 * cls + 0.75 * box, rel=1e-3)


class TestBCKD(TestCrossKD):
    options = {**TestCrossKD.options, "depth": 0}
    weights = (None, None)
    kinds = at_rest = ("retinanet",)
    steep = False
    bad = refused = ()
    reaches = ("head.cls_subnet.0.weight", "head.cls_score")
    spares = ()


class TestCrossKDRCNN(MethodOfHeads):
    method = CrossKDRCNNDistiller
    weights = (1.0, None)
    kinds = ("faster",)
    bad = [("temperature", 0.0, "HEAD.TEMPERATURE")]
    refused = [
        ("retinanet", "retinanet", ("StandardROIHeads", "RetinaNet")),
        ("faster", "cascade", ("teacher", "CascadeROIHeads")),
    ]
    # The student's own box head has no part in it.
    spares = ("roi_heads",)
    # The student's maps pass through an adapter, which is not trained yet, in half precision.
    rounding = 1e-3

    def test_the_formula_in_float64(self) -> None:
        """The teacher's head on both maps."""
        model, calls, inputs = self.model("faster"), [], make_batch(SIZES)
        model.student.roi_heads.box_pooler.register_forward_hook(lambda *x: calls.append(x))
        total = train_losses(model, inputs)["loss_distill"]
        teacher, levels = model.teacher.model, ("p2", "p3", "p4", "p5")
        maps = teacher.backbone(teacher.preprocess_image(inputs).tensor)
        ours, boxes = calls[0][1]
        adapters, heads = model.distillers["crosskd"].adapters, teacher.roi_heads
        crossed = [adapters[k](x) for k, x in zip(levels, ours, strict=True)]
        (logits, deltas), (soft, soft_deltas) = (
            map(number, heads.box_predictor(heads.box_head(heads.box_pooler(features, boxes))))
            for features in (crossed, [maps[k] for k in levels])
        )
        p, q = softmax(logits / 3, 1), softmax(soft / 3, 1)
        kl = 9 * (q * np.log(q / p)).sum(1).mean()
        q, rows = softmax(soft, 1)[:, :5], np.arange(len(soft))
        top, weights = q.argmax(1), q.max(1)
        difference = abs(deltas - soft_deltas).reshape(len(soft), 5, 4)[rows, top].sum(1)
        expected = 0.5 * kl + (weights * difference).sum() / (4 * weights.sum())
        assert float(total.detach()) == pytest.approx(expected, rel=1e-4)


def test_activation_after_counts_convolutions() -> None:
    conv, norm, relu = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()
    tower = nn.Sequential(conv, norm, relu, conv, norm, relu)
    assert [activation_after(tower, depth) for depth in (1, 2)] == [2, 5]
    retinanet = nn.Sequential(*[conv, relu] * 4)
    assert activation_after(retinanet, 3) == 5  # after cls_subnet[4]
    with pytest.raises(ValueError, match=r"depth is 3; expected 1 to 2"):
        activation_after(tower, 3)


def test_match_statistics_of_one_cell_and_of_a_constant() -> None:
    for shape in ((1, 2, 1, 1), (2, 2, 3, 3)):
        student = torch.full(shape, 0.3, requires_grad=True)
        teacher = torch.randn(shape)
        found = match_statistics(student, teacher, None)
        torch.testing.assert_close(found, teacher.mean(dim=(0, 2, 3), keepdim=True).expand(shape))
        (found * torch.randn(shape)).sum().backward()
        assert not student.grad.any()


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
