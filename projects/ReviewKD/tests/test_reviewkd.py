"""ReviewKD: against loops, and what may go wrong around them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from ssim_kd.modeling import DistillBatch, DistilledDetector, FrozenTeacher
from ssim_kd.projects.reviewkd import ReviewKDDistiller
from ssim_kd.projects.reviewkd.distiller import hierarchical_loss
from tests.helpers import (
    build,
    distilled_config,
    make_batch,
    stock_config,
    train_losses,
)

# The last levels are of 1 x 1 cells.
SIZES = ((64, 96), (48, 64))
STRIDES = {"p3": 8, "p4": 16, "p5": 32}


def bound(*, channels: tuple[int, int] = (3, 4), norm: str = "BN", inner: int = 2, **options):
    shapes = [
        {level: ShapeSpec(channels=c, stride=s) for level, s in STRIDES.items()} for c in channels
    ]
    distiller = ReviewKDDistiller(channels=inner, norm=norm, **options)
    distiller.bind_shapes(*shapes)
    return distiller


def pyramid(n: int, channels: int, side: int = 6) -> dict[str, torch.Tensor]:
    """Maps of 6 x 7, 3 x 4 and 2 x 2 cells."""
    sizes = [(-(-side // k), -(-(side + 1) // k)) for k in (1, 2, 4)]
    return {
        level: torch.randn(n, channels, *size) for level, size in zip(STRIDES, sizes, strict=True)
    }


def batch_of(n: int, size: tuple[int, int] = (48, 56)) -> DistillBatch:
    return DistillBatch([size] * n)


# By hand


def test_hierarchical_loss_worked_by_hand() -> None:
    # Height 2: pooled to a single cell. Differences 1, 3, 1, 3: MSE 5; their mean 2: 4.
    student = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]])
    found = hierarchical_loss(student, torch.zeros_like(student))
    assert float(found) == pytest.approx((5 + 4 / 2) / (1 + 1 / 2))
    # Of one cell, nothing is pooled.
    assert float(hierarchical_loss(student[..., :1, :1], torch.zeros(1, 1, 1, 1))) == 1


def test_hierarchical_loss_masked_is_cropped() -> None:
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    # Pooled to 4, 2 and 1 cells a side: the right half holds no cell that counts.
    found = hierarchical_loss(student, teacher, mask)
    difference = (student - teacher)[..., :4].double()
    terms = [
        nn.functional.adaptive_avg_pool2d(difference, (side, max(side // 2, 1))).square().mean()
        for side in (8, 4, 2, 1)
    ]
    terms[0] = difference.square().mean()
    expected = sum(t / 2**i for i, t in enumerate(terms)) / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    full = torch.ones_like(mask)
    torch.testing.assert_close(
        hierarchical_loss(student, teacher, full), hierarchical_loss(student, teacher)
    )
    assert float(hierarchical_loss(teacher, teacher)) == 0


# Against loops


def conv(x: Any, weight: Any) -> Any:
    """(N, C, H, W), zero padding, one cell after the other."""
    k = weight.shape[2] // 2
    x = np.pad(x, ((0, 0), (0, 0), (k, k), (k, k)))
    out = np.zeros((len(x), len(weight), x.shape[2] - 2 * k, x.shape[3] - 2 * k))
    for y in range(out.shape[2]):
        for z in range(out.shape[3]):
            window = x[:, :, y : y + 2 * k + 1, z : z + 2 * k + 1]
            out[:, :, y, z] = np.einsum("ncij,ocij->no", window, weight)
    return out


def batch_norm(x: Any) -> Any:
    out = np.empty_like(x)
    for c in range(x.shape[1]):
        out[:, c] = (x[:, c] - x[:, c].mean()) / math.sqrt(x[:, c].var() + 1e-5)
    return out


def pool(x: Any, side: int) -> Any:
    height, width = x.shape[2:]
    out = np.empty((*x.shape[:2], side, side))
    for i in range(side):
        for j in range(side):
            rows = slice(i * height // side, -(-(i + 1) * height // side))
            columns = slice(j * width // side, -(-(j + 1) * width // side))
            out[..., i, j] = x[:, :, rows, columns].mean(axis=(2, 3))
    return out


def test_reviewkd_equals_loops() -> None:
    distiller = bound(level_weights=(1.0, 0.5, 2.0))
    student, teacher = pyramid(2, 3), pyramid(2, 4)
    total, by_level = distiller(student, teacher, batch_of(2))
    expected, above = {}, None
    for level in ("p5", "p4", "p3"):
        fusion = distiller.fusions[level]
        w = {k: v.detach().double().numpy() for k, v in fusion.named_parameters()}
        x = batch_norm(conv(student[level].double().numpy(), w["reduce.weight"]))
        if above is not None:
            height, width = x.shape[2:]
            y = np.empty_like(x)
            for i in range(height):
                for j in range(width):
                    row, column = i * above.shape[2] // height, j * above.shape[3] // width
                    y[:, :, i, j] = above[:, :, row, column]
            z = conv(np.concatenate([x, y], axis=1), w["attention.weight"])
            z = 1 / (1 + np.exp(-z - w["attention.bias"][:, None, None]))
            x = x * z[:, :1] + y * z[:, 1:]
        else:
            assert fusion.attention is None
        above = x
        difference = batch_norm(conv(x, w["expand.weight"])) - teacher[level].double().numpy()
        loss, factor, weights = (difference**2).mean(), 1.0, 1.0
        for side in (4, 2, 1):
            if side < difference.shape[2]:
                factor /= 2
                weights += factor
                loss += factor * (pool(difference, side) ** 2).mean()
        expected[level] = loss / weights
        assert float(by_level[level]) == pytest.approx(expected[level], rel=1e-4)
    summed = expected["p3"] + 0.5 * expected["p4"] + 2 * expected["p5"]
    assert float(total.detach()) == pytest.approx(summed, rel=1e-4)


def test_two_halves_are_the_whole_with_a_norm_of_each_image() -> None:
    distiller = bound(channels=(3, 32), norm="GN", inner=32)
    student, teacher = pyramid(4, 3), pyramid(4, 32)
    sizes = [(48, 56), (48, 40), (32, 56), (40, 40)]
    found = []
    for half in (slice(0, 4), slice(0, 2), slice(2, 4)):
        maps = ({k: v[half] for k, v in x.items()} for x in (student, teacher))
        found.append(float(distiller(*maps, DistillBatch(sizes[half]))[0].detach()))
    assert found[0] == pytest.approx((found[1] + found[2]) / 2, rel=1e-5)


def test_the_optimum_is_0() -> None:
    # A level by itself: the fusion can give the teacher's map exactly.
    distiller = bound(norm="", inner=3, channels=(3, 3))
    for fusion in distiller.fusions.values():
        nn.init.dirac_(fusion.reduce.weight)
        nn.init.dirac_(fusion.expand.weight)
    coarsest = {k: torch.zeros_like(v) if k != "p5" else v for k, v in pyramid(1, 3).items()}
    _, by_level = distiller(coarsest, coarsest, batch_of(1))
    assert float(by_level["p5"]) == 0


# What may go wrong


def distilled(kind: str, teacher: str = "", **options: Any) -> DistilledDetector:
    return DistilledDetector(
        student=build(stock_config(kind)),
        teacher=FrozenTeacher(build(stock_config(teacher or kind, fpn=48), seed=1)),
        distillers=[ReviewKDDistiller(channels=8, **options)],
        max_iter=10,
    )


def test_reviewkd_beside_dkd(tmp_path) -> None:
    cfg = distilled_config("faster", "faster", tmp_path / "unread.pth")
    cfg.MODEL.DISTILL.LOSS_WEIGHT = 1.0
    cfg.MODEL.DISTILL.TERMS = [
        ["ReviewKDDistiller", "REVIEWKD.CHANNELS", 8],
        ["DKDDistiller", "DKD.BETA", 0.5],
    ]
    model = build(cfg)
    assert model.distillers["dkd"].scalar_weights == {"target": 1.0, "others": 0.5}
    model.teacher._load = lambda _: (build(stock_config("faster", fpn=48), seed=1), "")
    loss = train_losses(model, make_batch(SIZES))["loss_distill"]
    loss.backward()
    parts = [model.metrics[f"distill/{name}_weighted"] for name in ("reviewkd", "dkd")]
    assert all(part > 0 for part in parts)
    torch.testing.assert_close(sum(parts), loss.detach())
    assert {"distill/dkd_target", "distill/dkd_others", "distill/reviewkd_p2"} <= set(model.metrics)
