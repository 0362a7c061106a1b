"""ICD: the boxes asked for, the decoder and the three losses by hand and by loops; a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

from ssim_kd.engine.optimizer import GroupedOptimizer, build_optimizer
from ssim_kd.modeling import DistillBatch, DistilledDetector, FrozenTeacher, build_distillers
from ssim_kd.projects.icd import ICDDistiller
from ssim_kd.projects.icd.distiller import real_loss, sides_loss, value_loss
from ssim_kd.projects.icd.modules import (
    Queries,
    cell_positions,
    draw_queries,
    sine_encoding,
)
from tests.helpers import (
    TEACHER_FPN,
    bfloat16_without_onednn,
    build,
    full_config,
    gradients,
    make_batch,
    stock_config,
    train_losses,
)

STRIDES = {"p3": 8, "p4": 16}
#: Image 0 fills maps of 4 x 6 cells; the second leaves padding.
SIZES = [(32, 48), (20, 30)]
#: Two boxes of which one has no area; none.
BOXES = [[[4.0, 2.0, 28.0, 18.0], [9.0, 9.0, 9.0, 30.0], [40.0, 20.0, 48.0, 30.0]], []]
SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "hidden_dim": 6}
DRAWING: dict[str, Any] = {
    "fake_ratio": 5.0,
    "max_boxes": 300,
    "fake_size": (0.2, 0.2),
    "jitter": 0.3,
}


def batch_of(
    boxes: Sequence[Sequence[Sequence[float]]] = BOXES,
    sizes: Sequence[tuple[int, int]] = SIZES,
    **kwargs: Any,
) -> DistillBatch:
    instances = []
    for found, size in zip(boxes, sizes, strict=True):
        image = Instances(size)
        image.gt_boxes = Boxes(torch.tensor(found, dtype=torch.float32).reshape(-1, 4))
        image.gt_classes = torch.arange(len(found)) % 3
        instances.append(image)
    return DistillBatch(sizes, instances, **kwargs)


def bound(channels: tuple[int, int] = (3, 5), **options: Any) -> ICDDistiller:
    distiller = ICDDistiller(num_classes=3, **{**SMALL, **options})
    distiller.bind_shapes(
        *({k: ShapeSpec(channels=c, stride=s) for k, s in STRIDES.items()} for c in channels)
    )
    return distiller


def pyramid(channels: int, n: int = 2) -> dict[str, torch.Tensor]:
    return {
        "p3": torch.randn(n, channels, 4, 6, requires_grad=True),
        "p4": torch.randn(n, channels, 2, 3, requires_grad=True),
    }


def draw(seed: int = 0, boxes=BOXES, **options: Any) -> Queries:
    instances = batch_of(boxes).ground_truth("")
    return draw_queries(
        [x.gt_boxes.tensor for x in instances],
        [x.gt_classes for x in instances],
        SIZES,
        num_classes=3,
        generator=torch.Generator().manual_seed(seed),
        **{**DRAWING, **options},
    )


# The boxes that are asked for


def test_draw_queries_keeps_the_boxes_with_an_area_and_adds_fakes() -> None:
    found = draw()
    # Two real boxes and 5 fakes for each; a single fake if there is none.
    assert found.real.sum(dim=1).tolist() == [2, 0]
    assert found.valid.sum(dim=1).tolist() == [12, 1]
    assert found.real[0].tolist() == [True] * 2 + [False] * 10
    width, height = 48, 32
    expected = torch.tensor([[4 / width, 2 / height, 28 / width, 18 / height]])
    torch.testing.assert_close(found.boxes[0, :1], expected)
    torch.testing.assert_close(found.pixels[0, :2], torch.tensor([[24.0, 16.0], [8.0, 10.0]]))
    assert found.classes[0, :2].tolist() == [0, 2]


def test_draw_queries_at_most_max_boxes_but_every_real_one() -> None:
    assert draw(max_boxes=7).valid.sum(dim=1).tolist() == [7, 1]
    assert draw(max_boxes=1).valid.sum(dim=1).tolist() == [2, 1]
    assert draw(fake_ratio=0.0).valid.sum(dim=1).tolist() == [2, 1]


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


# Encodings


def test_sine_encoding_by_hand() -> None:
    found = sine_encoding(torch.tensor([[0.25, 0.5]]), 4)
    # Frequencies 1 and 1/100: sin(pi/2), sin(pi/200), cos of these; the same for pi.
    x, y = math.pi / 2, math.pi
    expected = [f(v / k) for v in (x, y) for f in (math.sin, math.cos) for k in (1, 100)]
    torch.testing.assert_close(found[0], torch.tensor(expected))


def test_cell_positions_of_a_padded_image_end_at_1_with_its_cells() -> None:
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    found = cell_positions(mask)
    assert found[0, 0, :, 0].tolist() == [0.5, 1, 1, 1]
    assert found[0, :, 1, 1].tolist() == [0.5, 1, 1]


def test_scales_of_boxes_by_hand() -> None:
    # 8 and 63 pixels: the first; 64 to 127: the second; 2000: the last.
    distiller = bound()
    queries = draw()._replace(pixels=torch.tensor([[[8.0, 63.9]], [[64.0, 2000.0]]]))
    queries = queries._replace(classes=torch.tensor([[2], [0]]), centers=torch.zeros(2, 1, 2))
    seen = []
    distiller.encoder.layers.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    distiller.encoder(queries)
    assert seen[0].shape == (2, 1, 3 + 8 + 10)
    assert seen[0][0, 0, :3].tolist() == [0, 0, 1] and seen[0][0, 0, 3:11].sum() == 4
    assert [row[0, 11:].nonzero().flatten().tolist() for row in seen[0]] == [[0, 5], [1, 9]]


# By loops, in float64


def linear(layer: Any, x: Any) -> Any:
    return layer.weight.detach().double() @ x + layer.bias.detach().double()


def norm(x: Any, layer: Any = None) -> Any:
    found = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()
    if layer is None:
        return found
    return found * layer.weight.detach().double() + layer.bias.detach().double()


def through(layers: Any, x: Any) -> Any:
    for layer in layers:
        x = linear(layer, x) if isinstance(layer, torch.nn.Linear) else x.clamp(min=0)
    return x


def sines(x: float, dim: int) -> list[float]:
    angles = [2 * math.pi * x / 10000 ** (2 * i / dim) for i in range(dim // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def loops(distiller: ICDDistiller, student, teacher, sizes, queries) -> dict[str, float]:
    """The three parts, box by box and cell by cell."""
    heads, width = distiller.heads, distiller.dim // distiller.heads
    decoder = distiller.decoder
    value, real, sides, boxes, positives = 0.0, 0.0, 0.0, 0, 0
    for i, (height, breadth) in enumerate(sizes):
        cells = []
        for level, stride in STRIDES.items():
            rows, columns = math.ceil(height / stride), math.ceil(breadth / stride)
            for y in range(rows):
                for x in range(columns):
                    at = sines((x + 1) / columns, distiller.dim // 2)
                    at += sines((y + 1) / rows, distiller.dim // 2)
                    t = teacher[level][i, :, y, x].detach().double()
                    s = student[level][i, :, y, x].detach().double()
                    position = linear(decoder.position, torch.tensor(at, dtype=torch.float64))
                    key, own = linear(decoder.key, t + position), linear(decoder.value, t)
                    cells.append((key, own, linear(distiller.student_value, s)))
        mask = [[0.0] * len(cells) for _ in range(heads)]
        for q in range(int(queries.valid[i].sum())):
            center = queries.centers[i, q].tolist()
            scales = [min(max(int(math.log2(v) - 5), 0), 4) for v in queries.pixels[i, q].tolist()]
            parts = [float(c == queries.classes[i, q]) for c in range(3)]
            parts += [v for x in center for v in sines(x, distiller.dim // 2)]
            parts += [float(k == scale) for scale in scales for k in range(5)]
            asked = through(distiller.encoder.layers, torch.tensor(parts, dtype=torch.float64))
            query, found = linear(decoder.query, asked), []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                logits = [float(query[part] @ key[part]) / math.sqrt(width) for key, _, _ in cells]
                total = sum(math.exp(v) for v in logits)
                attention = [math.exp(v) / total for v in logits]
                found.append(sum(a * c[1][part] for a, c in zip(attention, cells, strict=True)))
                if queries.real[i, q]:
                    mask[h] = [m + a for m, a in zip(mask[h], attention, strict=True)]
            x = norm(asked + linear(decoder.out, torch.cat(found)), decoder.norm1)
            x = norm(x + through(decoder.feed_forward, x), decoder.norm2)
            logit, *predicted = through(distiller.predictor, x).tolist()
            target = float(queries.real[i, q])
            boxes += 1
            real += max(logit, 0) - logit * target + math.log1p(math.exp(-abs(logit)))
            if target:
                positives += 1
                x0, y0, x1, y1 = queries.boxes[i, q].tolist()
                for k, (distance, extent) in enumerate(
                    (
                        (center[0] - x0, x1 - x0),
                        (center[1] - y0, y1 - y0),
                        (x1 - center[0], x1 - x0),
                        (y1 - center[1], y1 - y0),
                    )
                ):
                    sides += abs(1 / (1 + math.exp(-predicted[k])) - distance) / extent
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for m, (_, t, s) in zip(mask[h], cells, strict=True):
                if sum(mask[h]):
                    error = (norm(s[part]) - norm(t[part])).square().mean()
                    value += m / sum(mask[h]) * float(error) / heads / len(sizes)
    return {"value": value, "real": real / boxes, "sides": sides / max(positives, 1)}


@pytest.mark.parametrize("sizes", [SIZES, [(32, 48)] * 2], ids=["padded", "full"])
def test_forward_is_the_formula_by_loops(sizes) -> None:
    weights = {"value": 8.0, "real": 0.5, "sides": 2.0}
    distiller = bound(part_weights=weights, detach_iters=0)
    for p in distiller.parameters():
        torch.nn.init.normal_(p, std=0.5)
    student, teacher = pyramid(3), pyramid(5)
    batch = batch_of(sizes=sizes, iteration=5)
    instances = batch.ground_truth("")
    queries = draw_queries(
        [x.gt_boxes.tensor for x in instances],
        [x.gt_classes for x in instances],
        sizes,
        num_classes=3,
        generator=batch.generator("icd"),
        **DRAWING,
    )
    expected = loops(distiller, student, teacher, sizes, queries)
    total, parts = distiller(student, teacher, batch)
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) > 0.1
    summed = sum(weights[k] * v for k, v in expected.items())
    assert total.item() == pytest.approx(summed, rel=1e-4)
    assert distiller.scalar_weights.items() >= weights.items()


# By hand


def test_value_loss_by_hand() -> None:
    # Two cells, one head of two channels: normalised (1, -1) and (-1, 1). They differ only in
    # the first cell, by 2 in each channel.
    student = torch.tensor([[[[5.0, 1.0]], [[0.0, 7.0]]]])
    teacher = torch.tensor([[[[1.0, 3.0]], [[2.0, 9.0]]]])
    weights = torch.tensor([[[0.75, 0.25]]])
    assert float(value_loss(student, teacher, weights)) == pytest.approx(0.75 * 4, rel=1e-4)
    # Only their ratio counts; an image without any counts as 0.
    both = torch.cat([4 * weights, 0 * weights])
    pair = (x.expand(2, -1, -1, -1) for x in (student, teacher))
    assert float(value_loss(*pair, both)) == pytest.approx(0.75 * 4 / 2, rel=1e-4)


def test_real_and_sides_losses_by_hand() -> None:
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


def test_value_is_0_the_least_where_the_student_is_the_teacher() -> None:
    distiller = bound(channels=(5, 5), detach_iters=0)
    distiller.student_value.load_state_dict(distiller.decoder.value.state_dict())
    teacher = pyramid(5)
    student = {k: v.detach().clone().requires_grad_() for k, v in teacher.items()}
    total, parts = distiller(student, teacher, batch_of())
    assert float(parts["value"]) == pytest.approx(0, abs=1e-10)
    total.backward()
    assert all(float(v.grad.abs().max()) < 1e-6 for v in student.values())
    _, parts = distiller(pyramid(5), teacher, batch_of())
    assert parts["value"] > 0.1


def test_two_halves_of_a_batch_are_the_whole_in_what_reaches_the_student() -> None:
    distiller = bound(detach_iters=0)
    student, teacher = pyramid(3), pyramid(5)
    queries = draw(boxes=[BOXES[0], [BOXES[0][0]]])
    maps = [distiller.align(k, student[k], teacher[k], batch_of()) for k in STRIDES]
    whole = distiller.losses(maps, queries)
    halves = []
    for i in (0, 1):
        half = slice(i, i + 1)
        of_image = [
            x._replace(
                student=x.student[half],
                teacher=x.teacher[half],
                mask=None if x.mask is None else x.mask[half],
            )
            for x in maps
        ]
        halves.append(distiller.losses(of_image, Queries(*(x[half] for x in queries))))
    torch.testing.assert_close((halves[0]["value"] + halves[1]["value"]) / 2, whole["value"])
    # The auxiliary losses are means over boxes, of which the second image has fewer.
    real = (12 * halves[0]["real"] + 6 * halves[1]["real"]) / 18
    sides = (2 * halves[0]["sides"] + halves[1]["sides"]) / 3
    torch.testing.assert_close(real, whole["real"])
    torch.testing.assert_close(sides, whole["sides"])


# Where the gradient goes


def test_gradients_of_each_part() -> None:
    distiller = bound(detach_iters=0)
    student, teacher = pyramid(3), pyramid(5)
    maps = [distiller.align(k, student[k], teacher[k].detach(), batch_of()) for k in STRIDES]
    parts = distiller.losses(maps, draw())
    own = dict(distiller.named_parameters())
    inputs = [*own.values(), *student.values()]

    def reached(part: str) -> set[str]:
        grads = torch.autograd.grad(parts[part], inputs, retain_graph=True, allow_unused=True)
        return {
            name
            for name, grad in zip([*own, *student], grads, strict=True)
            if grad is not None and grad.any()
        }

    assert reached("value") == {"student_value.weight", "student_value.bias", "p3", "p4"}
    decoder = {name for name in own if not name.startswith("student_value")}
    # A softmax does not see what all its logits have in common.
    for part in ("real", "sides"):
        assert decoder - {"decoder.key.bias"} <= reached(part) <= decoder


def test_the_student_does_not_learn_before_detach_iters() -> None:
    distiller = bound(detach_iters=10)
    for iteration, learns in ((9, False), (10, True)):
        student = pyramid(3)
        distiller.zero_grad()
        distiller(student, pyramid(5), batch_of(iteration=iteration))[0].backward()
        assert distiller.student_value.weight.grad.any()
        assert all((v.grad is not None and bool(v.grad.any())) == learns for v in student.values())


# In a training


def model_of(kind: str) -> tuple[Any, Any]:
    cfg = full_config()
    cfg.MODEL.DISTILL.NAME = "ICDDistiller"
    options = {"DIM": 16, "HEADS": 2, "HIDDEN_DIM": 8, "DETACH_ITERS": 0}
    cfg.MODEL.DISTILL.ICD.update(options)
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES", 3)
    teacher = FrozenTeacher(build(stock_config(kind, *classes, fpn=TEACHER_FPN), seed=1))
    distillers = build_distillers(cfg)
    model = DistilledDetector(
        student=build(stock_config(kind)), teacher=teacher, distillers=distillers, max_iter=10
    )
    cfg.SOLVER.MAX_ITER = 10
    return cfg, model


@pytest.mark.parametrize(("kind", "autocast"), [("faster", False), ("retinanet", True)])
def test_icd_trains_student_and_own_modules_alone(kind, autocast) -> None:
    cfg, model = model_of(kind)
    distiller = model.distillers["icd"]
    # The classes are the student's; the last levels have a single cell.
    assert distiller.num_classes == 5 and len(distiller.levels) == 5
    with bfloat16_without_onednn(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = train_losses(model, make_batch(((64, 96),)))["loss_distill"]
    loss.backward()
    assert set(model.metrics) >= {"distill/icd_value", "distill/icd_real_weighted"}
    assert set(gradients(distiller)) == {name for name, _ in distiller.named_parameters()}
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert all(name.startswith("backbone.") for name in gradients(model.student))
    assert model.student.backbone.fpn_output3.weight.grad.any()
    assert all(p.grad is None for p in model.teacher.model.backbone.parameters())
    own = {f"distillers.icd.{name}" for name in distiller.state_dict()}
    assert own <= set(model.state_dict()) and not own & set(model.student.state_dict())

    # AdamW for all of the method's parameters and nothing else.
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, GroupedOptimizer)
    main, adamw = optimizer.optimizers
    assert isinstance(adamw, torch.optim.AdamW)
    (group,) = adamw.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in distiller.parameters()}
    assert (group["lr"], group["weight_decay"]) == (1e-4, 1e-4)
    ours = {id(p) for g in main.param_groups for p in g["params"]}
    assert not ours & {id(p) for p in distiller.parameters()}
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    optimizer.step()
    optimizer.step()
    norm = torch.stack([p.grad.norm() for p in distiller.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)
    # The second of ten steps, by a cosine.
    assert group["lr"] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 0.1)) / 2)
    assert any(not torch.equal(p, before[name]) for name, p in distiller.named_parameters())

    state = {name: value.clone() for name, value in model.state_dict().items()}
    for p in distiller.parameters():
        torch.nn.init.zeros_(p)
    model.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Faults


def test_levels_of_unlike_channels() -> None:
    shapes = {"res4": ShapeSpec(channels=8, stride=16), "res5": ShapeSpec(channels=16, stride=32)}
    with pytest.raises(ValueError, match="'res4': 8, 'res5': 16"):
        ICDDistiller(num_classes=3).bind_shapes(shapes, shapes)


def test_a_student_without_classes() -> None:
    with pytest.raises(ValueError, match="Identity has no 'num_classes'"):
        ICDDistiller().bind(torch.nn.Identity(), None)
