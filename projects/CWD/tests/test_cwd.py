"""CWD: the KL divergence of the channels' softmax over the cells."""

from __future__ import annotations

import math

import pytest
import torch

from ssim_kd.modeling import DistillBatch
from ssim_kd.projects.cwd import CWDDistiller, channel_kl
from tests.level_maps import bind, maps_of, mask_of

MASK = mask_of(2, 4, 5, rows=3, columns=2)


def loops(student: torch.Tensor, teacher: torch.Tensor, tau: float, mask: torch.Tensor) -> float:
    """The formula, cell by cell."""
    total = 0.0
    n, c = student.shape[:2]
    for i in range(n):
        for k in range(c):
            s, t = student[i, k][mask[i]].tolist(), teacher[i, k][mask[i]].tolist()
            sum_s = sum(math.exp(v / tau) for v in s)
            sum_t = sum(math.exp(v / tau) for v in t)
            for a, b in zip(s, t, strict=True):
                p, q = math.exp(b / tau) / sum_t, math.exp(a / tau) / sum_s
                total += p * math.log(p / q)
    return tau**2 * total / (n * c)


def pair(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, 5, dtype=dtype), torch.randn(2, 3, 4, 5, dtype=dtype)


def test_channel_kl_by_hand() -> None:
    # softmax(T) = (3, 1) / 4, softmax(S) = (1, 1) / 2: KL = 3/4 log(3/2) + 1/4 log(1/2).
    student = torch.zeros(1, 1, 1, 2)
    teacher = torch.tensor([math.log(3), 0.0]).view(1, 1, 1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    assert float(channel_kl(student, teacher, 1.0, mask)) == pytest.approx(expected)
    # At tau = 2 the same probabilities come of twice the values, and the loss is 4 times as large.
    assert float(channel_kl(student, 2 * teacher, 2.0, mask)) == pytest.approx(4 * expected)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_level_loss_is_the_formula_by_loops(tau, mask) -> None:
    student, teacher = pair()
    expected = loops(student, teacher, tau, torch.ones_like(MASK) if mask is None else mask)
    distiller = bind(CWDDistiller(temperature=tau), 3)
    found = distiller.level_loss(maps_of(student, teacher, mask), DistillBatch([]))
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_channel_kl_of_equal_patterns_is_0_the_least() -> None:
    student, teacher = pair()
    student.requires_grad_()
    # An offset of a channel does not matter.
    loss = channel_kl(student, student.detach() + 7, 1.0, MASK)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert float(student.grad.abs().max()) < 1e-12
    assert channel_kl(student, teacher, 1.0, MASK) > 0.1


def test_channel_kl_gradient() -> None:
    student, teacher = pair()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: channel_kl(s, teacher, 0.7, MASK), student)


def test_channel_kl_of_padding_that_is_not_finite_and_of_samples_without_cells() -> None:
    student, teacher = pair()
    mask = MASK.clone()
    mask[0] = False
    expected = channel_kl(student[1:], teacher[1:], 1.0, mask[1:]) / 2
    student = student.masked_fill(~mask[:, None], math.inf).requires_grad_()
    loss = channel_kl(student, teacher.masked_fill(~mask[:, None], math.nan), 1.0, mask)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(student.grad).all() and not student.grad[0].any()
