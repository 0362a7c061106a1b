"""FGD: focal loss in boxes and beyond, attention, and the global relation."""

from __future__ import annotations

import math

import pytest
import torch

from ssim_kd.projects.fgd import FGDDistiller, GlobalContext
from tests.level_maps import batch_of, bind, maps_of, mask_of

MASK = mask_of(2, 4, 5, rows=3, columns=4)
# Two boxes that overlap and one without area; none.
BOXES = [[[1.0, 2.0, 14.0, 10.0], [9.0, 9.0, 15.0, 15.0], [3.0, 3.0, 3.0, 9.0]], []]
BATCH = batch_of(BOXES, (32, 40))


def pair(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 4, 5, dtype=dtype), torch.randn(2, 4, 4, 5, dtype=dtype)


def make(**options) -> FGDDistiller:
    distiller = bind(FGDDistiller(**options), 4)
    for p in distiller.parameters():
        torch.nn.init.normal_(p)
    return distiller


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def attention(x: torch.Tensor, cells: list, tau: float = 0.5) -> tuple[dict, list[float]]:
    """A_s by cell and A_c by channel of one image."""
    c = len(x)
    strengths = [sum(abs(float(x[k][p])) for k in range(c)) / c / tau for p in cells]
    spatial = dict(zip(cells, (len(cells) * v for v in softmax(strengths)), strict=True))
    means = [sum(abs(float(x[k][p])) for p in cells) / len(cells) / tau for k in range(c)]
    return spatial, [c * v for v in softmax(means)]


def context(block: GlobalContext, x: torch.Tensor, cells: list) -> dict:
    """GC(x) of one image by cell: a list of its channels."""
    attend = block.attend.weight.detach().double().flatten()
    weights = softmax([float((attend * x[(slice(None), *p)]).sum()) for p in cells])
    pooled = sum(w * x[(slice(None), *p)] for w, p in zip(weights, cells, strict=True))
    first, norm, _, last = block.transform
    hidden = first.weight.detach().double().flatten(1) @ pooled + first.bias.detach().double()
    deviation = hidden - hidden.mean()
    hidden = deviation / (deviation.square().mean() + 1e-5).sqrt()
    hidden = (
        hidden * norm.weight.detach().double().flatten() + norm.bias.detach().double().flatten()
    )
    out = last.weight.detach().double().flatten(1) @ hidden.clamp(min=0)
    out = out + last.bias.detach().double()
    return {p: x[(slice(None), *p)] + out for p in cells}


def loops(distiller: FGDDistiller, student, teacher, mask, boxes) -> dict[str, float]:
    """The four parts, cell by cell, in float64."""
    parts = dict.fromkeys(("fg", "bg", "attention", "global"), 0.0)
    n, c, height, width = student.shape
    for i in range(n):
        s, t = student[i].double(), teacher[i].double()
        cells = [(y, x) for y in range(height) for x in range(width) if mask[i, y, x]]
        (spatial_s, channel_s), (spatial_t, channel_t) = attention(s, cells), attention(t, cells)
        foreground = dict.fromkeys(cells, 0.0)
        for x0, y0, x1, y1 in boxes[i]:
            left, top, right, bottom = (
                *(math.floor(v / 8) for v in (x0, y0)),
                *(math.ceil(v / 8) for v in (x1, y1)),
            )
            for y, x in cells:
                if x0 < x1 and y0 < y1 and left <= x <= right and top <= y <= bottom:
                    share = 1 / ((bottom - top + 1) * (right - left + 1))
                    foreground[y, x] = max(foreground[y, x], share)
        empty = sum(v == 0 for v in foreground.values())
        for p in cells:
            error = sum(float(s[k][p] - t[k][p]) ** 2 * channel_t[k] for k in range(c))
            error *= spatial_t[p] / n
            parts["fg"] += foreground[p] * error
            parts["bg"] += error / empty if foreground[p] == 0 else 0.0
            parts["attention"] += abs(spatial_s[p] - spatial_t[p]) / n
        parts["attention"] += sum(abs(a - b) for a, b in zip(channel_s, channel_t, strict=True)) / n
        ours = context(distiller.student_context["p3"], s, cells)
        theirs = context(distiller.teacher_context["p3"], t, cells)
        parts["global"] += sum(float((ours[p] - theirs[p]).square().sum()) for p in cells) / n
    return parts


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_level_loss_are_the_formula_by_loops(mask) -> None:
    distiller = make()
    student, teacher = pair()
    cells = torch.ones_like(MASK) if mask is None else mask
    expected = loops(distiller, student, teacher, cells, BOXES)
    found = distiller.level_loss(maps_of(student, teacher, mask), BATCH)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-5)
    assert min(expected.values()) > 0.1


def test_foreground_by_hand() -> None:
    # T = 0: attention is 1 everywhere. S = 1 in the box's two cells of four: (1/2 + 1/2) C / 2
    # images; S = 2 in one of the two others: 4 / 2 C / 2.
    student = torch.tensor([1.0, 1.0, 2.0, 0.0]).view(1, 1, 1, 4).expand(2, 3, 1, 4)
    batch = batch_of([[[0.0, 0.0, 7.0, 0.001]], []], (8, 32))
    # The box covers two rows by the formula, of which the map has one.
    distiller = bind(FGDDistiller(), 3)
    found = distiller.level_loss(maps_of(student, torch.zeros(2, 3, 1, 4)), batch)
    assert float(found["fg"]) == pytest.approx(2 * 0.25 * 3 / 2)
    # The other image is all background: (1 + 1 + 4) / 4.
    assert float(found["bg"]) == pytest.approx((4 / 2 + 6 / 4) * 3 / 2)


@pytest.mark.parametrize("padded", [False, True])
def test_reference_scales_the_sums(padded) -> None:
    mask = MASK.clone() if padded else None
    if padded:
        mask[:] = MASK[-1]  # 12 of 20 cells, in both images
    maps = maps_of(*pair(), mask)
    plain, scaled = make(), make(reference=(2, 80, 160, 12))
    scaled.load_state_dict(plain.state_dict())
    before, after = (d.level_loss(maps, BATCH) for d in (plain, scaled))
    cells = 10 * 20 / (12 if padded else 20)
    for part, factor in (("fg", 3), ("bg", 3), ("global", 3 * cells)):
        torch.testing.assert_close(after[part], factor * before[part])
    assert 3 * before["attention"] < after["attention"] < cells * before["attention"]
