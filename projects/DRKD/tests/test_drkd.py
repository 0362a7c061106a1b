"""DRKD: relations between cells and between boxes, by hand and by loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ssim_kd.losses import roi_crops
from ssim_kd.projects.drkd import DRKDDistiller
from ssim_kd.projects.drkd.modules import BoxRelation, GraphReasoning
from tests.level_maps import batch_of, bind, maps_of, mask_of

PARTS = ("pixel", "relation", "instance")
MASK = mask_of(2, 4, 5, rows=3, columns=4)
# Three boxes, one without area; one.
BOXES = [
    [[1.0, 2.0, 14.0, 10.0], [9.0, 9.0, 25.0, 30.0], [3.0, 3.0, 3.0, 9.0], [0.0, 8.0, 39.0, 20.0]],
    [[4.0, 4.0, 20.0, 16.0]],
]
BATCH = batch_of(BOXES, (32, 40))
STUDENT, TEACHER = 2, 3


def pair(n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, STUDENT, 4, 5), torch.randn(n, TEACHER, 4, 5)


def make(student: int = STUDENT, *, random: bool = True, **options: Any) -> DRKDDistiller:
    options = {"nodes": [2], "box_levels": 1, **options}
    distiller = bind(DRKDDistiller(**options), student, TEACHER)
    if random:
        for p in distiller.parameters():
            torch.nn.init.normal_(p, std=0.5)
    return distiller


# By loops, in float64


def affine(layer: Any, vector: torch.Tensor) -> torch.Tensor:
    out = layer.weight.detach().double().flatten(1) @ vector
    return out if layer.bias is None else out + layer.bias.detach().double()


def graph(unit: GraphReasoning, images: torch.Tensor, masks: torch.Tensor) -> list[torch.Tensor]:
    """P(x) of each valid cell of all images."""
    inputs, outputs = [], []
    for x, mask in zip(images.double(), masks, strict=True):
        cells = [x[:, i, j] for i, j in mask.nonzero().tolist()]
        states = [affine(unit.state, cell) for cell in cells]
        assigned = [affine(unit.assign, cell) for cell in cells]
        m = len(assigned[0])
        nodes = [sum(b[k] * s for b, s in zip(assigned, states, strict=True)) for k in range(m)]
        weight, bias = (p.detach().double() for p in (unit.relate.weight, unit.relate.bias))
        related = []
        for k in range(m):
            mixed = sum(weight[k, j] * nodes[j] for j in range(m)) + bias[k]
            related.append(affine(unit.update, (nodes[k] + mixed).clamp(min=0)))
        for cell, b in zip(cells, assigned, strict=True):
            inputs.append(cell)
            outputs.append(affine(unit.out, sum(b[k] * related[k] for k in range(m))))
    stacked = torch.stack(outputs)
    deviation = stacked - stacked.mean(dim=0)
    scaled = deviation / (deviation.square().mean(dim=0) + 1e-5).sqrt()
    weight, bias = (p.detach().double() for p in (unit.norm.weight, unit.norm.bias))
    return [x + row * weight + bias for x, row in zip(inputs, scaled, strict=True)]


def relation(unit: BoxRelation, crops: torch.Tensor) -> list[torch.Tensor]:
    """Z of each box of an image, flat."""
    boxes = [crop.double().flatten() for crop in crops]
    scores = [math.exp(float(affine(unit.filter, x))) for x in boxes]
    found = []
    for x in boxes:
        theta = affine(unit.theta, x)
        logits = [
            float(theta @ affine(unit.phi, y)) * score / sum(scores)
            for y, score in zip(boxes, scores, strict=True)
        ]
        attention = [math.exp(v - max(logits)) for v in logits]
        mixed = sum(
            a / sum(attention) * affine(unit.g, y) for a, y in zip(attention, boxes, strict=True)
        )
        found.append(x + affine(unit.out, mixed))
    return found


def adapted(layer: Any, crop: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution of a flat (C, 3, 3) crop."""
    bins = crop.view(-1, 9)
    return torch.stack([affine(layer, bins[:, k]) for k in range(9)], dim=1).flatten()


def root(differences: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(d.square().sum()) for d in differences))


def loops(distiller: DRKDDistiller, student, teacher, masks) -> dict[str, float]:
    """The three parts."""
    ours = graph(distiller.student_graphs["p3"], student, masks)
    theirs = graph(distiller.teacher_graphs["p3"], teacher, masks)
    layer = distiller.pixel_maps["p3"]
    pixel = root([t - affine(layer, s) for s, t in zip(ours, theirs, strict=True)])
    boxes = [x.gt_boxes.tensor for x in BATCH.instances]
    found = {"pixel": pixel, "relation": 0.0, "instance": 0.0}
    for s, t in zip(
        roi_crops(student.double(), boxes, 8, 3),
        roi_crops(teacher.double(), boxes, 8, 3),
        strict=True,
    ):
        s_related = relation(distiller.student_relations["p3"], s)
        t_related = relation(distiller.teacher_relations["p3"], t)
        layer = distiller.relation_maps["p3"]
        found["relation"] += root(
            [b - adapted(layer, a) for a, b in zip(s_related, t_related, strict=True)]
        )
        layer = distiller.instance_maps["p3"]
        found["instance"] += root(
            [b.flatten() - adapted(layer, a.flatten()) for a, b in zip(s, t, strict=True)]
        )
    return found


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_level_loss_are_the_formula_by_loops(mask) -> None:
    distiller = make()
    student, teacher = pair()
    cells = torch.ones_like(MASK) if mask is None else mask
    expected = loops(distiller, student, teacher, cells)
    found = distiller.level_loss(maps_of(student, teacher, mask), BATCH)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) > 0.1


# By hand


def test_graph_reasoning_by_hand() -> None:
    # One node: states (x, x), assignments x. V = sum x^2 = 5 twice; V + R(V) = 5 + 10 + 1 = 16; W
    # swaps and doubles; Z B = 32 x twice; out: 64 x, of which the norm makes (-1, 1).
    unit = GraphReasoning(1, 1)
    for layer, weight in (("state", [1.0, 1.0]), ("assign", [1.0]), ("out", [1.0, 1.0])):
        p = getattr(unit, layer).weight
        p.data = torch.tensor(weight).view_as(p)
    unit.state.bias.data.zero_()
    unit.assign.bias.data.zero_()
    unit.relate.weight.data.fill_(2.0)
    unit.relate.bias.data.fill_(1.0)
    unit.update.weight.data = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    seen = []
    unit.norm.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert unit(x, None).flatten().tolist() == [1, 2]  # the norm begins as 0
    torch.testing.assert_close(seen[0], torch.tensor([[64.0], [128.0]]))
    unit.norm.weight.data.fill_(3.0)
    torch.testing.assert_close(unit(x, None), torch.tensor([[1.0 - 3.0], [2.0 + 3.0]]))


def test_box_relation_by_hand() -> None:
    # Two boxes of one feature, of which the third layer makes (1, 3) and the filter equal shares.
    unit = BoxRelation(2)
    for p in unit.parameters():
        torch.nn.init.zeros_(p)
    unit.theta.weight.data = torch.tensor([[1.0, 0.0]])
    unit.phi.weight.data = torch.tensor([[1.0, 0.0]])
    unit.g.weight.data = torch.tensor([[0.0, 1.0]])
    unit.out.bias.data = torch.tensor([0.0, 10.0])
    unit.out.weight.data = torch.tensor([[1.0], [0.0]])
    crops = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(2, 2, 1, 1)
    # The first asks with 0: the mean, 2. The second with 2: logits 0 and 4 / 2.
    share = 1 / (1 + math.exp(-2))
    expected = torch.tensor([[0 + 2, 11], [2 + (1 - share) + 3 * share, 13]])
    torch.testing.assert_close(unit(crops).flatten(1), expected)


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 1, 0]])
def test_box_relation_does_not_depend_on_the_order_of_boxes(order) -> None:
    unit, crops = BoxRelation(18), torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(unit(crops[order]), unit(crops)[order])
    assert not torch.allclose(unit(crops)[:1], unit(crops[:1]), atol=1e-3)


# What must hold


def test_equal_maps_cost_nothing_and_have_a_finite_gradient() -> None:
    distiller = make(student=TEACHER, random=False)
    distiller.student_relations.load_state_dict(distiller.teacher_relations.state_dict())
    for layer in ("pixel_maps", "relation_maps", "instance_maps"):
        own = getattr(distiller, layer)["p3"]
        own.weight.data = torch.eye(TEACHER).view_as(own.weight)
        own.bias.data.zero_()
    student = torch.randn(2, TEACHER, 4, 5, requires_grad=True)
    total, parts = distiller({"p3": student}, {"p3": student.detach().clone()}, BATCH)
    total.backward()
    assert set(parts) == {f"p3_{part}" for part in PARTS}
    assert all(float(v) == pytest.approx(0, abs=1e-5) for v in parts.values())
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("padded", [False, True])
def test_reference_scales_the_norms(padded) -> None:
    mask = MASK.clone() if padded else None
    if padded:
        mask[:] = MASK[-1]  # 12 of 20 cells, in both images
    maps = maps_of(*pair(), mask)
    # 10 x 20 cells, 4 times the channels, 4 images in the place of 2.
    plain, scaled = make(), make(reference=(4, 80, 160, 12))
    scaled.load_state_dict(plain.state_dict())
    before, after = (d.level_loss(maps, BATCH) for d in (plain, scaled))
    cells = 10 * 20 / (12 if padded else 20)
    torch.testing.assert_close(after["pixel"], math.sqrt(2 * 4 * cells) * before["pixel"])
    for part in ("relation", "instance"):
        torch.testing.assert_close(after[part], 2 * 2 * before[part])


def test_two_halves_of_a_batch_by_a_reference_are_the_whole_of_the_boxes_alone() -> None:
    distiller = make(reference=(2, 32, 40, 3))
    student, teacher = pair()
    student[1] *= 3
    teacher[1] *= 3
    whole = distiller.level_loss(maps_of(student, teacher), BATCH)
    halves = [
        distiller.level_loss(
            maps_of(student[i : i + 1], teacher[i : i + 1]), batch_of(BOXES[i : i + 1], (32, 40))
        )
        for i in (0, 1)
    ]
    for part in ("relation", "instance"):
        torch.testing.assert_close((halves[0][part] + halves[1][part]) / 2, whole[part])
    # Each half has its own moments, and the mean of roots is below the root of the mean.
    pixel = (halves[0]["pixel"] + halves[1]["pixel"]) / 2
    assert 0.8 < float((pixel / whole["pixel"]).detach()) < 0.98


# Faults
