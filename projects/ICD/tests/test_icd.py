"""ICD: the boxes asked for, the decoder and the three losses; where the gradient goes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec

from ssim_kd.projects.icd import ICDDistiller
from ssim_kd.projects.icd.distiller import real_loss, sides_loss, value_loss
from ssim_kd.projects.icd.modules import Queries, draw_queries
from tests.level_maps import STRIDES, batch_of
from tests.projects.float64 import affine, cells, normed, softmax
from tests.projects.maps import MethodOfMaps

#: Three boxes of which one has no area; none.
BOXES = [[[4.0, 2.0, 28.0, 18.0], [9.0, 9.0, 9.0, 30.0], [40.0, 20.0, 48.0, 30.0]], []]


def draw(boxes=BOXES, **options: Any) -> Queries:
    drawing = {"fake_ratio": 5.0, "max_boxes": 300, "fake_size": (0.2, 0.2), "jitter": 0.3}
    tensors = [torch.tensor(found).reshape(-1, 4) for found in boxes]
    return draw_queries(
        tensors,
        [torch.arange(len(found)) % 3 for found in boxes],
        [(32, 48), (20, 30)],
        num_classes=3,
        generator=torch.Generator().manual_seed(0),
        **{**drawing, **options},
    )


def through(layers: Any, x: np.ndarray) -> np.ndarray:
    for layer in layers:
        x = affine(layer, x) if isinstance(layer, torch.nn.Linear) else x.clip(0)
    return x


def sines(x: np.ndarray, dim: int) -> np.ndarray:
    """(..., 2) to (..., 2 dim)."""
    angles = 2 * np.pi * x[..., None] / 10000 ** (2 * np.arange(dim // 2) / dim)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(*x.shape[:-1], -1)


class TestICD(MethodOfMaps):
    method = ICDDistiller
    options = {"num_classes": 3, "dim": 8, "heads": 2, "hidden_dim": 6, "detach_iters": 0}
    bad = [
        ("part_weights.value", -1.0, "ICD.VALUE_WEIGHT"),
        ("part_weights.sides", math.nan, "ICD.SIDES_WEIGHT"),
        ("dim", 10, "ICD.DIM"),
        ("heads", 0, "ICD.HEADS"),
        ("hidden_dim", 2.5, "ICD.HIDDEN_DIM"),
        ("fake_ratio", -1, "ICD.FAKE_RATIO"),
        ("max_boxes", 0, "ICD.MAX_BOXES"),
        ("fake_size", [0.2], "ICD.FAKE_SIZE"),
        ("jitter", 0.6, "ICD.JITTER"),
        ("detach_iters", -1, "ICD.DETACH_ITERS"),
        ("clip_norm", 0, "ICD.CLIP_NORM"),
        ("level_weights", [1.0, 2.0], "LEVEL_WEIGHTS"),
    ]
    at_rest = crops = needs_boxes = asks = True
    level_weights = ()

    def rest(self, distiller) -> None:
        distiller.student_value.load_state_dict(distiller.decoder.value.state_dict())

    def test_by_hand(self) -> None:
        # Two cells, one head of two channels: normalised (1, -1) and (-1, 1). They differ in the
        # first cell only, by 2 in each channel.
        student = torch.tensor([[[[5.0, 1.0]], [[0.0, 7.0]]]])
        teacher = torch.tensor([[[[1.0, 3.0]], [[2.0, 9.0]]]])
        weights = torch.tensor([[[0.75, 0.25]]])
        assert float(value_loss(student, teacher, weights)) == pytest.approx(0.75 * 4, rel=1e-4)
        # Only their ratio counts; an image without any counts as 0.
        both = torch.cat([4 * weights, 0 * weights])
        pair = (x.expand(2, -1, -1, -1) for x in (student, teacher))
        assert float(value_loss(*pair, both)) == pytest.approx(0.75 * 4 / 2, rel=1e-4)
        queries = draw()._replace(
            boxes=torch.tensor([[[0.25, 0.0, 0.75, 0.25], [0.0, 0.0, 1.0, 1.0]]]),
            centers=torch.tensor([[[0.5, 0.125], [0.5, 0.5]]]),
            real=torch.tensor([[True, False]]),
            valid=torch.tensor([[True, False]]),
        )
        assert float(real_loss(torch.zeros(1, 2), queries)) == pytest.approx(math.log(2))
        # sigmoid(0) = 1/2: off by 1/4 of a width of 1/2, by 3/8 of a height of 1/4, twice each.
        expected = 2 * (0.25 / 0.5 + 0.375 / 0.25)
        assert float(sides_loss(torch.zeros(1, 2, 4), queries)) == pytest.approx(expected)

    def formula(self, distiller, student, teacher, batch):
        queries = draw_queries(
            batch.boxes(""),
            [x.gt_classes for x in batch.instances],
            batch.image_sizes,
            num_classes=3,
            max_boxes=300,
            generator=batch.generator("icd"),
            **distiller.drawing,
        )
        decoder, width = distiller.decoder, distiller.dim // distiller.heads
        value, real, sides = [], [], []
        for i, (height, breadth) in enumerate(batch.image_sizes):
            ours, theirs, at = [], [], []
            for level, stride in STRIDES.items():
                h, w = -(-height // stride), -(-breadth // stride)
                ours.append(cells(student[level][i, :, :h, :w]))
                theirs.append(cells(teacher[level][i, :, :h, :w]))
                y, x = np.mgrid[1 : h + 1, 1 : w + 1]
                at.append(np.stack([x.ravel() / w, y.ravel() / h], axis=1))
            ours, theirs, at = (np.concatenate(x) for x in (ours, theirs, at))
            boxes, centers, pixels, classes, is_real = (
                x[i][queries.valid[i]].double().numpy() for x in queries[:5]
            )
            scales = (np.log2(pixels) - 5).clip(0, 4).astype(int)
            asked = [np.eye(3)[classes.astype(int)], sines(centers, distiller.dim // 2)]
            asked = np.concatenate([*asked, np.eye(5)[scales].reshape(-1, 10)], axis=1)
            asked = through(distiller.encoder.layers, asked)
            query, own = affine(decoder.query, asked), affine(decoder.value, theirs)
            position = affine(decoder.position, sines(at, distiller.dim // 2))
            key, mine = (
                affine(decoder.key, theirs + position),
                affine(distiller.student_value, ours),
            )
            found = []
            for h in range(distiller.heads):
                part = slice(h * width, (h + 1) * width)
                weights = softmax(query[:, part] @ key[:, part].T / math.sqrt(width), 1)
                found.append(weights @ own[:, part])
                looked = (weights * is_real[:, None]).sum(0)
                error = (normed(None, mine[:, part], -1) - normed(None, own[:, part], -1)) ** 2
                value.append((looked @ error.mean(1)) / looked.sum())
            x = normed(
                decoder.norm1, asked + affine(decoder.out, np.concatenate(found, axis=1)), -1
            )
            x = normed(decoder.norm2, x + through(decoder.feed_forward, x), -1)
            predicted = through(distiller.predictor, x)
            sure = 1 / (1 + np.exp(-predicted))
            real += list(-np.log(np.where(is_real, sure[:, 0], 1 - sure[:, 0])))
            distances = np.concatenate([centers - boxes[:, :2], boxes[:, 2:] - centers], axis=1)
            extents = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
            off = (abs(sure[:, 1:] - distances) / extents).sum(1)
            sides += list(off[is_real.astype(bool)])
        return {"value": np.mean(value), "real": np.mean(real), "sides": np.mean(sides)}


def test_draw_queries_keeps_the_boxes_with_an_area_and_adds_fakes() -> None:
    found = draw()
    # Two real boxes and 5 fakes for each; a single fake if there is none.
    assert found.valid.sum(dim=1).tolist() == [12, 1]
    assert found.real[0].tolist() == [True] * 2 + [False] * 10 and not found.real[1].any()
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([4 / 48, 2 / 32, 28 / 48, 18 / 32]))
    torch.testing.assert_close(found.pixels[0, :2], torch.tensor([[24.0, 16.0], [8.0, 10.0]]))
    assert found.classes[0, :2].tolist() == [0, 2]
    # At most so many, but every real one.
    for options, expected in (
        ({"max_boxes": 7}, 7),
        ({"max_boxes": 1}, 2),
        ({"fake_ratio": 0.0}, 2),
    ):
        assert draw(**options).valid.sum(dim=1).tolist() == [expected, 1]


def test_draw_queries_fakes_lie_in_the_image_and_centres_in_the_boxes() -> None:
    found = draw(boxes=[BOXES[0] * 20, []], fake_ratio=20.0, max_boxes=1000)
    sides = found.boxes[..., 2:] - found.boxes[..., :2]
    assert found.boxes.min() >= 0 and found.boxes.max() <= 1 and (sides > 0).all()
    offsets = (found.centers - (found.boxes[..., :2] + found.boxes[..., 2:]) / 2) / sides
    assert 0.29 < offsets.abs().max() <= 0.3 + 1e-5
    assert torch.equal(found.centers, found.centers.clamp(0, 1))
    fakes = ~found.real[0]
    assert fakes.sum() == 800 and set(found.classes[0][fakes].tolist()) == {0, 1, 2}
    # Of mean 0.2 and deviation 0.2, at least 0.002, at most 0.6; those at the border are cut.
    assert sides[0][fakes].max() < 0.61 and 0.15 < sides[0][fakes].mean() < 0.25


def test_scales_of_boxes_by_hand() -> None:
    # 8 and 63.9 pixels: the first; 64 to 127: the second; 2000: the last.
    encoder, seen = TestICD().make().encoder, []
    queries = draw()._replace(pixels=torch.tensor([[[8.0, 63.9]], [[64.0, 2000.0]]]))
    queries = queries._replace(classes=torch.tensor([[2], [0]]), centers=torch.zeros(2, 1, 2))
    encoder.layers.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    encoder(queries)
    assert [row[0, 11:].nonzero().flatten().tolist() for row in seen[0]] == [[0, 5], [1, 9]]


def test_gradients_of_each_part() -> None:
    distiller, (student, teacher) = TestICD().make(), TestICD().maps((32, 48))
    batch = batch_of(BOXES, (32, 48))
    maps = [distiller.align(k, student[k], teacher[k], batch) for k in STRIDES]
    parts = distiller.losses(maps, draw())
    own = dict(distiller.named_parameters())
    inputs = {**own, **student}

    def reached(part: str) -> set[str]:
        grads = torch.autograd.grad(
            parts[part], list(inputs.values()), retain_graph=True, allow_unused=True
        )
        pairs = zip(inputs, grads, strict=True)
        return {name for name, grad in pairs if grad is not None and grad.any()}

    assert reached("value") == {"student_value.weight", "student_value.bias", *STRIDES}
    decoder = {name for name in own if not name.startswith("student_value")}
    # A softmax does not see what all its logits have in common.
    for part in ("real", "sides"):
        assert decoder - {"decoder.key.bias"} <= reached(part) <= decoder


def test_the_student_does_not_learn_before_detach_iters() -> None:
    for iteration, learns in ((9, False), (10, True)):
        distiller, (student, teacher) = TestICD().make(detach_iters=10), TestICD().maps((32, 48))
        batch = batch_of(BOXES, (32, 48), iteration=iteration)
        distiller(student, teacher, batch)[0].backward()
        assert distiller.student_value.weight.grad.any()
        assert all((v.grad is not None and bool(v.grad.any())) == learns for v in student.values())


def test_its_own_optimizer() -> None:
    distiller = TestICD().make(lr=3e-4, clip_norm=0.5)
    (group,) = distiller.param_groups(0.1)
    assert {id(p) for p in group["params"]} == {id(p) for p in distiller.parameters()}
    values = [group[k] for k in ("optimizer", "lr", "weight_decay", "clip_norm")]
    assert values == ["AdamW", 3e-4, 1e-4, 0.5]
    assert [group["schedule"](x) for x in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])


def test_what_it_cannot_serve() -> None:
    shapes = {"res4": ShapeSpec(channels=8, stride=16), "res5": ShapeSpec(channels=16, stride=32)}
    with pytest.raises(ValueError, match="'res4': 8, 'res5': 16"):
        ICDDistiller(num_classes=3).bind_shapes(shapes, shapes)
    with pytest.raises(ValueError, match="Identity has no 'num_classes'"):
        ICDDistiller().bind(torch.nn.Identity(), None)
