"""PKD: half the squared error of standardised maps, which is 1 - Pearson's correlation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec

from ssim_kd.modeling import DistillBatch, LevelMaps
from ssim_kd.projects.pkd import PKDDistiller

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
