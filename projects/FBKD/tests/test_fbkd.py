"""FBKD: attention-guided features, pooled features, and non-local relations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ssim_kd.modeling import DistillBatch
from ssim_kd.projects.fbkd import FBKDDistiller, NonLocal
from tests.level_maps import bind, maps_of, mask_of

PARTS = ("feature", "channel", "spatial", "nonlocal")
MASK = mask_of(2, 4, 5, rows=3, columns=4)
BATCH = DistillBatch([(32, 40)] * 2)
STUDENT, TEACHER = 3, 4


def pair(student: int = STUDENT) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, student, 4, 5), torch.randn(2, TEACHER, 4, 5)


def make(student: int = STUDENT, *, random: bool = True, **options) -> FBKDDistiller:
    options = {"pool_strides": [2], "inner_channels": [2], **options}
    distiller = bind(FBKDDistiller(**options), student, TEACHER)
    if random:
        for p in distiller.parameters():
            torch.nn.init.normal_(p)
    return distiller


def cells_of(mask: torch.Tensor) -> list[tuple[int, int]]:
    return [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def spatial(x: torch.Tensor, cells: list, tau: float) -> list[float]:
    return [
        len(cells) * v
        for v in softmax([float(x[(slice(None), *p)].abs().mean()) / tau for p in cells])
    ]


def channel(x: torch.Tensor, cells: list, tau: float) -> list[float]:
    means = [sum(abs(float(row[p])) for p in cells) / len(cells) / tau for row in x]
    return [len(x) * v for v in softmax(means)]


def affine(module, vector: torch.Tensor) -> torch.Tensor:
    out = module.weight.detach().double().flatten(1) @ vector
    return out if module.bias is None else out + module.bias.detach().double()


def non_local(block: NonLocal, images: torch.Tensor, masks: torch.Tensor) -> list[torch.Tensor]:
    """The block, one pair of cells after another; the cells of all images in one list."""
    inputs, outputs, side = [], [], block.stride
    for x, mask in zip(images.double(), masks, strict=True):
        cells = cells_of(mask)
        windows: dict = {}
        for p in cells:
            windows.setdefault((p[0] // side, p[1] // side), []).append(p)
        key, value = (
            [
                torch.stack([affine(m, x[(slice(None), *p)]) for p in ps]).amax(0)
                for ps in windows.values()
            ]
            for m in (block.key, block.value)
        )
        for p in cells:
            query = affine(block.query, x[(slice(None), *p)])
            found = sum((query @ k) * v for k, v in zip(key, value, strict=True)) / len(key)
            inputs.append(x[(slice(None), *p)])
            outputs.append(affine(block.out, found))
    stacked = torch.stack(outputs)
    deviation = stacked - stacked.mean(0)
    normed = deviation / (deviation.square().mean(0) + 1e-5).sqrt()
    normed = normed * block.norm.weight.detach().double() + block.norm.bias.detach().double()
    return [a + b for a, b in zip(inputs, normed, strict=True)]


def loops(distiller: FBKDDistiller, student, teacher, mask) -> dict[str, float]:
    """The four norms, cell by cell, in float64."""
    squares = dict.fromkeys(PARTS, 0.0)
    tau, level = distiller.temperature, "p3"
    for i in range(len(student)):
        s, t, cells = student[i].double(), teacher[i].double(), cells_of(mask[i])
        a = {p: affine(distiller.feature_maps[level], s[(slice(None), *p)]) for p in cells}
        weights = [
            (x + y) / 2 for x, y in zip(spatial(s, cells, tau), spatial(t, cells, tau), strict=True)
        ]
        by_channel = [1.0] * len(t)
        if distiller.channel_attention:
            adapted = torch.zeros_like(t)
            for p, v in a.items():
                adapted[(slice(None), *p)] = v
            both = zip(channel(adapted, cells, tau), channel(t, cells, tau), strict=True)
            by_channel = [(x + y) / 2 for x, y in both]
        for p, w in zip(cells, weights, strict=True):
            error = (t[(slice(None), *p)] - a[p]).square()
            squares["feature"] += sum(
                w * c * float(e) for c, e in zip(by_channel, error, strict=True)
            )
        mean_s, mean_t = (
            torch.stack([x[(slice(None), *p)] for p in cells]).mean(0) for x in (s, t)
        )
        squares["channel"] += float(
            (mean_t - affine(distiller.channel_maps[level], mean_s)).square().sum()
        )
        kernel = distiller.spatial_maps[level]
        plane = s.mean(0)
        for y, x in cells:
            total = kernel.bias.item()
            for dy, dx in itertools.product((-1, 0, 1), repeat=2):
                if (y + dy, x + dx) in cells:
                    weight = kernel.weight[0, 0, dy + 1, dx + 1].item()
                    total += weight * float(plane[y + dy, x + dx])
            squares["spatial"] += (float(t[:, y, x].mean()) - total) ** 2
    ours = non_local(distiller.student_nonlocal[level], student, mask)
    theirs = non_local(distiller.teacher_nonlocal[level], teacher, mask)
    for x, y in zip(ours, theirs, strict=True):
        squares["nonlocal"] += float((y - affine(distiller.nonlocal_maps[level], x)).square().sum())
    return {k: math.sqrt(v) for k, v in squares.items()}


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("one_stage", [False, True])
def test_level_loss_are_the_formula_by_loops(mask, one_stage) -> None:
    distiller = make(channel_attention=one_stage, temperature=0.3)
    student, teacher = pair()
    cells = torch.ones_like(MASK) if mask is None else mask
    # The loops have zeros beyond the image, as they have beyond the map.
    student = student.masked_fill(~cells[:, None], 0.0)
    expected = loops(distiller, student, teacher, cells)
    found = distiller.level_loss(maps_of(student, teacher, mask), BATCH)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-4)


def test_channel_attention_is_of_the_students_own_map_where_channels_are_equal() -> None:
    distiller = make(TEACHER, channel_attention=True)
    student, teacher = pair(TEACHER)
    distiller.zero_grad()
    weights = distiller._attention(student, torch.full_like(student, 1e3), teacher, None)
    same = distiller._attention(student, student, teacher, None)
    torch.testing.assert_close(weights, same)


def test_norms_by_hand() -> None:
    # T - S = 2 in each of 4 channels and 20 cells of 2 images. Flat maps: attention is 1.
    student = torch.ones(2, TEACHER, 4, 5)
    distiller = make(TEACHER, random=False)
    make_identities(distiller)
    found = distiller.level_loss(maps_of(student, 3 * student), BATCH)
    assert float(found["feature"]) == pytest.approx(2 * math.sqrt(2 * TEACHER * 20))
    assert float(found["channel"]) == pytest.approx(2 * math.sqrt(2 * TEACHER))
    assert float(found["spatial"]) == pytest.approx(2 * math.sqrt(2 * 20))
    assert float(found["nonlocal"]) == pytest.approx(2 * math.sqrt(2 * TEACHER * 20))


def make_identities(distiller: FBKDDistiller) -> None:
    for linear in (distiller.channel_maps["p3"], distiller.nonlocal_maps["p3"]):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    for conv in (distiller.feature_maps["p3"], distiller.spatial_maps["p3"]):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)


def test_equal_maps_cost_nothing_and_have_a_finite_gradient() -> None:
    distiller = make(TEACHER, random=False)
    make_identities(distiller)  # the non-local blocks begin as it
    _, teacher = pair()
    student = teacher.clone().requires_grad_()
    total, scalars = distiller({"p3": student}, {"p3": teacher}, BATCH)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-6) and len(scalars) == 4
    assert torch.isfinite(student.grad).all()


def test_the_attention_has_no_gradient() -> None:
    student, teacher = pair()
    student.requires_grad_()
    distiller = make()
    assert not distiller._attention(student, teacher, teacher, None).requires_grad


@pytest.mark.parametrize("padded", [False, True])
def test_reference_scales_the_norms(padded) -> None:
    mask = MASK.clone() if padded else None
    if padded:
        mask[:] = MASK[-1]
    maps = maps_of(*pair(), mask)
    plain, scaled = make(), make(reference=(8, 80, 160, 9 * TEACHER))
    scaled.load_state_dict(plain.state_dict())
    before, after = (d.level_loss(maps, BATCH) for d in (plain, scaled))
    cells = math.sqrt(10 * 20 / (12 if padded else 20))
    factors = {"feature": 2 * 3 * cells, "channel": 2 * 3, "spatial": 2 * cells}
    for part, factor in {**factors, "nonlocal": 2 * 3 * cells}.items():
        torch.testing.assert_close(after[part], factor * before[part])


def test_masked_is_cropped() -> None:
    distiller = make()
    student, teacher = pair()
    mask = MASK.clone()
    mask[:] = MASK[-1]
    cropped = maps_of(student[..., :3, :4], teacher[..., :3, :4])
    expected = distiller.level_loss(cropped, BATCH)
    # Only the 3x3 convolution looks beyond the image; the cropped map has zeros there.
    student = student.masked_fill(~mask[:, None], 0.0)
    teacher = teacher.masked_fill(~mask[:, None], 1e3)
    found = distiller.level_loss(maps_of(student, teacher, mask), BATCH)
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value)


def test_two_halves_of_a_batch_are_less_than_the_whole() -> None:
    """Only of norms: the non-local part has a batch norm, whose statistics differ too."""
    student, teacher = pair()
    distiller = make(reference=(2, 80, 160, 12))
    whole = distiller.level_loss(maps_of(student, teacher), BATCH)
    halves = [
        distiller.level_loss(maps_of(student[i : i + 1], teacher[i : i + 1]), BATCH) for i in (0, 1)
    ]
    for part in ("feature", "channel", "spatial"):
        one, other = (float(half[part]) for half in halves)
        assert float(whole[part]) == pytest.approx(math.sqrt((one**2 + other**2) / 2), rel=1e-5)
        mean = (one + other) / 2
        assert mean <= whole[part] <= math.sqrt(2) * mean
    # As they are, norms of a half are smaller by about the root of two.
    raw = make()
    raw.load_state_dict(distiller.state_dict())
    whole = raw.level_loss(maps_of(student, teacher), BATCH)
    halves = [
        raw.level_loss(maps_of(student[i : i + 1], teacher[i : i + 1]), BATCH) for i in (0, 1)
    ]
    for part in ("feature", "channel", "spatial"):
        one, other = (float(half[part]) for half in halves)
        assert float(whole[part]) == pytest.approx(math.hypot(one, other), rel=1e-5)


def test_non_local_of_a_single_cell() -> None:
    block = NonLocal(3, 2, stride=8)
    torch.nn.init.ones_(block.norm.weight)
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    found = block(x, None)
    found.sum().backward()
    assert found.shape == (1, 3) and torch.isfinite(found).all() and x.grad.any()
