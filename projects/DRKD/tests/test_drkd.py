"""DRKD: relations between cells and between boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ssim_kd.losses import roi_crops
from ssim_kd.projects.drkd import DRKDDistiller
from ssim_kd.projects.drkd.modules import BoxRelation, GraphReasoning
from tests.level_maps import STRIDES, bind
from tests.projects.float64 import affine, cells, images_of, norm, normed, number, softmax
from tests.projects.maps import MethodOfMaps


def graph(unit: GraphReasoning, images: list[np.ndarray]) -> list[np.ndarray]:
    """P(x): the cells of each image."""
    found = []
    for x in images:
        states, assigned = (affine(layer, cells(x)) for layer in (unit.state, unit.assign))
        nodes = assigned.T @ states
        mixed = number(unit.relate.weight) @ nodes + number(unit.relate.bias)[:, None]
        related = affine(unit.update, (nodes + mixed).clip(0))
        found.append(affine(unit.out, assigned @ related))
    added = images_of(normed(unit.norm, np.concatenate(found)), [len(x) for x in found])
    return [cells(x) + y for x, y in zip(images, added, strict=True)]


def relation(unit: BoxRelation, crops: np.ndarray) -> np.ndarray:
    """Z of the boxes (R, C, 3, 3) of an image."""
    x = crops.reshape(len(crops), -1)
    logits = affine(unit.theta, x) @ affine(unit.phi, x).T * softmax(affine(unit.filter, x)[:, 0])
    return crops + affine(unit.out, softmax(logits, 1) @ affine(unit.g, x)).reshape(crops.shape)


def adapted(layer, crops: np.ndarray) -> np.ndarray:
    return np.moveaxis(affine(layer, np.moveaxis(crops, 1, -1)), -1, 1)


class TestDRKD(MethodOfMaps):
    method = DRKDDistiller
    options = {"nodes": [2] * 4, "box_levels": 2}
    bad = [
        ("part_weights.pixel", -1.0, "DRKD.PIXEL_WEIGHT"),
        ("part_weights.instance", math.nan, "DRKD.INSTANCE_WEIGHT"),
        ("nodes", [0], "DRKD.NODES"),
        ("nodes", [2.5], "DRKD.NODES"),
        ("box_levels", -1, "DRKD.BOX_LEVELS"),
        ("reference", [2, 800], "DRKD.REFERENCE"),
    ]
    at_rest = crops = needs_boxes = True
    # Of boxes there is a norm for each image.
    growth = {
        "pixel": math.sqrt(2 * 3 * 4),
        "relation": 2 * math.sqrt(3),
        "instance": 2 * math.sqrt(3),
    }

    def rest(self, distiller) -> None:
        # The graphs begin as the identity.
        distiller.student_relations.load_state_dict(distiller.teacher_relations.state_dict())
        for name in ("pixel_maps", "relation_maps", "instance_maps"):
            for layer in getattr(distiller, name).values():
                layer.weight.data = torch.eye(4).view_as(layer.weight)
                layer.bias.data.zero_()

    def test_by_hand(self) -> None:
        # One node: states (x, x), assignments x. V = sum x^2 = 5 twice; V + R(V) = 5 + 10 + 1 = 16;
        # W swaps and doubles; Z B = 32 x twice; out: 64 x, of which the norm makes (-1, 1).
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

    def level_formula(self, distiller, level, student, teacher, batch):
        ours = graph(distiller.student_graphs[level], student)
        theirs = graph(distiller.teacher_graphs[level], teacher)
        layer = distiller.pixel_maps[level]
        found = {"pixel": norm(t - affine(layer, s) for s, t in zip(ours, theirs, strict=True))}
        if level not in distiller.student_relations:
            return found
        found |= {"relation": 0.0, "instance": 0.0}
        for i, pair in enumerate(zip(student, teacher, strict=True)):
            boxes = [batch.instances[i].gt_boxes.tensor]
            s, t = (
                number(roi_crops(torch.tensor(x)[None], boxes, STRIDES[level], 3)[0]) for x in pair
            )
            found["instance"] += norm(t - adapted(distiller.instance_maps[level], s))
            s = relation(distiller.student_relations[level], s)
            t = relation(distiller.teacher_relations[level], t)
            found["relation"] += norm(t - adapted(distiller.relation_maps[level], s))
        return found


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


@pytest.mark.parametrize("options", [{"nodes": [2]}, {"box_levels": 5}])
def test_what_does_not_fit_the_levels(options) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"^{name} "):
        bind(DRKDDistiller(**options), 3, levels=STRIDES)
