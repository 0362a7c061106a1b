"""PKD: half the squared error of standardised maps, which is 1 - Pearson's correlation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec

from ssim_kd.modeling import DISTILLER_REGISTRY, DistillBatch, LevelMaps
from ssim_kd.projects.pkd import PKDDistiller
from tests.helpers import TEACHER_FPN, build, distilled_config, save_weights, stock_config
from tests.helpers import train_losses as losses_of

SHAPE = {"p3": ShapeSpec(channels=1, stride=8)}


def make(channels: int = 1, **options) -> PKDDistiller:
    shapes = {"p3": ShapeSpec(channels=channels, stride=8)}
    distiller = PKDDistiller(**options)
    distiller.bind_shapes(shapes, shapes)
    return distiller


def level_loss(student, teacher, mask=None, **options) -> torch.Tensor:
    distiller = make(student.shape[1], **options)
    return distiller.level_loss(maps_of(student, teacher, mask), DistillBatch([]))


def maps_of(student, teacher, mask=None) -> LevelMaps:
    return LevelMaps("p3", student, teacher, mask)


def test_a_value_worked_by_hand() -> None:
    # s = (1, 2, 3, 4), t = (1, 3, 2, 4): deviations (-1.5, -.5, .5, 1.5) and (-1.5, .5, -.5, 1.5);
    # r = (2.25 - .25 - .25 + 2.25) / 5 = 0.8. Standard deviations with n - 1 scale by 3/4.
    student = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2)
    teacher = torch.tensor([1.0, 3, 2, 4]).view(1, 1, 2, 2)
    assert float(level_loss(student, teacher)) == pytest.approx(0.75 * (1 - 0.8), rel=1e-5)


def test_it_is_1_minus_pearsons_correlation_of_each_channel() -> None:
    student, teacher = torch.randn(2, 3, 16, 20), torch.randn(2, 3, 16, 20)
    teacher += 0.5 * student
    flat = [x.transpose(0, 1).flatten(1).double().numpy() for x in (student, teacher)]
    r = np.mean([np.corrcoef(s, t)[0, 1] for s, t in zip(*flat, strict=True)])
    n = 2 * 16 * 20
    assert float(level_loss(student, teacher)) == pytest.approx((1 - r) * (n - 1) / n, rel=1e-4)


def test_gain_and_offset_do_not_matter() -> None:
    student, teacher = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    expected = level_loss(student, teacher)
    torch.testing.assert_close(level_loss(7 * student + 3, teacher / 9 - 1), expected)
    assert float(level_loss(student, 5 * student - 2)) == pytest.approx(0, abs=1e-6)
    assert float(level_loss(student, -student)) == pytest.approx(2, rel=0.02)


def test_masked_is_cropped() -> None:
    student, teacher = torch.randn(1, 3, 6, 8), torch.randn(1, 3, 6, 8)
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[:, :4, :5] = True
    expected = level_loss(student[..., :4, :5], teacher[..., :4, :5])
    torch.testing.assert_close(level_loss(student, teacher, mask), expected)
    torch.testing.assert_close(
        level_loss(student, teacher, torch.ones_like(mask)), level_loss(student, teacher)
    )


def test_the_gradient(monkeypatch) -> None:
    # In double precision, which the loss itself takes to single.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    student = torch.randn(2, 2, 3, 3, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(2, 2, 3, 3, dtype=torch.double)
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[1, 2:] = False
    distiller = make(2)
    for cells in (None, mask):
        assert torch.autograd.gradcheck(
            lambda x, cells=cells: distiller.level_loss(
                maps_of(x, teacher, cells), DistillBatch([])
            ),
            (student,),
        )


@pytest.mark.parametrize("mask", [None, torch.ones(1, 3, 3, dtype=torch.bool)])
def test_constant_maps_keep_value_and_gradient_finite(mask) -> None:
    student = torch.ones(1, 2, 3, 3, requires_grad=True)
    loss = level_loss(student, torch.randn(1, 2, 3, 3), mask)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("valid", [0, 1])
def test_hardly_any_valid_cell_is_no_loss(valid) -> None:
    student = torch.randn(1, 2, 3, 3, requires_grad=True)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[:, :valid, :valid] = True
    loss = level_loss(student, torch.randn(1, 2, 3, 3), mask)
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_a_single_cell_is_no_loss() -> None:
    student = torch.randn(1, 2, 1, 1, requires_grad=True)
    loss = level_loss(student, torch.randn(1, 2, 1, 1))
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_half_precision_is_taken_to_single() -> None:
    student, teacher = torch.randn(1, 2, 6, 6) + 30, torch.randn(1, 2, 6, 6) + 30
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = level_loss(student, teacher)
    assert found.dtype == torch.float32 and found == level_loss(student, teacher)


def test_levels_and_weight_are_the_shared_ones() -> None:
    distiller = make(weight=6.0, level_weights=(0.5,))
    student, teacher = {"p3": torch.randn(1, 1, 4, 4)}, {"p3": torch.randn(1, 1, 4, 4)}
    total, by_level = distiller(student, teacher, DistillBatch([(32, 32)]))
    raw = level_loss(student["p3"], teacher["p3"])
    torch.testing.assert_close(total, 0.5 * raw)
    torch.testing.assert_close(by_level["p3"], raw)
    assert distiller.weight(0.0) == 6.0


def test_it_distils(tmp_path: Path) -> None:
    weights = save_weights(stock_config("retinanet", fpn=TEACHER_FPN), tmp_path / "t.pth")
    opts = ("MODEL.DISTILL.NAME", "PKDDistiller", "MODEL.DISTILL.PKD.EPS", 1e-3)
    assert "PKDDistiller" in DISTILLER_REGISTRY
    model = build(distilled_config("faster", "retinanet", weights, *opts))
    distiller = model.distillers["pkd"]
    assert distiller.eps == 1e-3 and distiller.levels == ["p3", "p4", "p5"]
    losses = losses_of(model)
    losses["loss_distill"].backward()
    assert 0 < float(losses["loss_distill"].detach()) < 6 * 3 * 2
    assert model.student.backbone.fpn_output3.weight.grad.any()
    assert set(model.metrics) >= {f"distill/pkd_p{i}" for i in (3, 4, 5)}
