"""PKD: half the squared error of standardised maps, which is 1 - Pearson's correlation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ssim_kd.projects.pkd import PKDDistiller
from tests.level_maps import bind, maps_of
from tests.projects.float64 import cells
from tests.projects.maps import MethodOfMaps


def level_loss(student, teacher, mask=None) -> torch.Tensor:
    distiller = bind(PKDDistiller(), student.shape[1])
    return distiller.level_loss(maps_of(student, teacher, mask), None)


class TestPKD(MethodOfMaps):
    method = PKDDistiller
    weights = (6.0, 10.0)
    bad = [("eps", value, "PKD.EPS") for value in (0.0, -1.0, math.nan)]
    at_rest = crops = True

    def test_by_hand(self) -> None:
        # s = (1, 2, 3, 4), t = (1, 3, 2, 4): deviations (-1.5, -.5, .5, 1.5), (-1.5, .5, -.5, 1.5);
        # r = (2.25 - .25 - .25 + 2.25) / 5 = 0.8. Standard deviations with n - 1 scale by 3/4.
        student = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2)
        teacher = torch.tensor([1.0, 3, 2, 4]).view(1, 1, 2, 2)
        expected = pytest.approx(0.75 * (1 - 0.8), rel=1e-5)
        assert float(level_loss(student, teacher)) == expected
        # Neither gain nor offset matters.
        assert float(level_loss(7 * student + 3, teacher / 9 - 1)) == expected

    def level_formula(self, distiller, level, student, teacher, batch):
        s, t = (np.concatenate([cells(x) for x in images]) for images in (student, teacher))
        r = [np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(s.shape[1])]
        return (1 - np.mean(r)) * (len(s) - 1) / len(s)


@pytest.mark.parametrize("masked", [False, True])
def test_a_constant_channel_has_no_gradient(masked) -> None:
    """Rounding makes a deviation of it, of which the authors' code has a gradient of 1 / eps."""
    student = torch.randn(1, 3, 8, 9)
    student[:, 0] = 1 / 3
    student.requires_grad_()
    mask = torch.ones(1, 8, 9, dtype=torch.bool) if masked else None
    loss = level_loss(student, torch.randn(1, 3, 8, 9), mask)
    loss.backward()
    assert torch.isfinite(loss) and not student.grad[:, 0].any()
    assert 0 < float(student.grad.abs().max()) < 1


@pytest.mark.parametrize("valid", [0, 1])
def test_hardly_any_valid_cell_is_no_loss(valid) -> None:
    student = torch.randn(1, 2, 3, 3, requires_grad=True)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[:, :valid, :valid] = True
    loss = level_loss(student, torch.randn(1, 2, 3, 3), mask)
    loss.backward()
    assert loss == 0 and not student.grad.any()
