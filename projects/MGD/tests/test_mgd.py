"""MGD: the teacher's map, generated from a student's with holes."""

from __future__ import annotations

import pytest
import torch

from ssim_kd.modeling import DistillBatch
from ssim_kd.projects.mgd import MGDDistiller
from tests.level_maps import bind, maps_of, mask_of

MASK = mask_of(2, 5, 6, rows=3, columns=2)
BATCH = DistillBatch([(40, 48)] * 2, iteration=5)


def pair(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 5, 6, dtype=dtype), torch.randn(2, 3, 5, 6, dtype=dtype)


def convolved(x: torch.Tensor, conv: torch.nn.Conv2d) -> torch.Tensor:
    """A 3x3 convolution of zero-padded (C, H, W), number by number."""
    weight, bias = conv.weight.detach().double(), conv.bias.detach().double()
    _, height, width = x.shape
    found = torch.zeros(len(weight), height, width, dtype=torch.float64)
    for o in range(len(weight)):
        for row in range(height):
            for column in range(width):
                total = float(bias[o])
                for c in range(len(x)):
                    for i in (-1, 0, 1):
                        for j in (-1, 0, 1):
                            y, z = row + i, column + j
                            if 0 <= y < height and 0 <= z < width:
                                total += float(weight[o, c, i + 1, j + 1] * x[c, y, z])
                found[o, row, column] = total
    return found


def loops(distiller: MGDDistiller, maps, batch: DistillBatch) -> torch.Tensor:
    """(T - G(S o M))^2 of every element."""
    holes = distiller.random_mask(maps, batch).double()
    first, _, last = distiller.generators[maps.level]
    found = [
        convolved(convolved(s.double() * hole, first).clamp(min=0), last)
        for s, hole in zip(maps.student, holes, strict=True)
    ]
    return (torch.stack(found) - maps.teacher.double()) ** 2


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("reference", [(), (2, 80, 160, 12)], ids=["sum", "reference"])
def test_level_loss_is_the_formula_by_loops(mask, reference) -> None:
    distiller = bind(MGDDistiller(mask_ratio=0.4, reference=reference), 3)
    maps = maps_of(*pair(), mask)
    cells = torch.ones_like(MASK) if mask is None else mask
    images = list(zip(loops(distiller, maps, BATCH), cells, strict=True))
    if reference:
        # The mean over each sample's cells and channels, times those of the reference.
        expected = 12 * (10 * 20) * sum(error[:, cells].mean() for error, cells in images) / 2
    else:
        expected = sum(error[:, cells].sum() for error, cells in images) / 2
    assert distiller.level_loss(maps, BATCH).item() == pytest.approx(float(expected), rel=1e-5)


def test_reference_of_the_batch_itself_changes_nothing() -> None:
    maps = maps_of(*pair())
    plain = bind(MGDDistiller(), 3)
    same = bind(MGDDistiller(reference=(7, 40, 48, 3)), 3)
    same.load_state_dict(plain.state_dict())
    torch.testing.assert_close(same.level_loss(maps, BATCH), plain.level_loss(maps, BATCH))


def test_a_generator_that_makes_the_teacher_costs_nothing() -> None:
    student, _ = pair()
    student.abs_().requires_grad_()
    distiller = bind(MGDDistiller(mask_ratio=0.0), 3)
    for conv in (distiller.generators["p3"][0], distiller.generators["p3"][2]):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    loss = distiller.level_loss(maps_of(student, student.detach().clone()), BATCH)
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_the_mask_is_shared_by_the_channels_and_has_the_ratio() -> None:
    distiller = bind(MGDDistiller(mask_ratio=0.65), 3)
    maps = maps_of(torch.randn(2, 3, 100, 100), torch.randn(2, 3, 100, 100))
    holes = distiller.random_mask(maps, BATCH)
    assert holes.shape == (2, 1, 100, 100) and set(holes.unique().tolist()) == {0, 1}
    assert float(holes.mean()) == pytest.approx(0.35, abs=0.015)
    assert not torch.equal(holes[0], holes[1])
    assert bind(MGDDistiller(mask_ratio=0), 3).random_mask(maps, BATCH).all()


def test_the_mask_depends_on_seed_iteration_and_level_alone() -> None:
    distiller = bind(MGDDistiller(), 3, levels={"p3": 8, "p4": 16})
    maps = maps_of(*pair())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = distiller.random_mask(maps, BATCH)
    # The student's random numbers stay as they are, and a restored state draws the same.
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(distiller.random_mask(maps, BATCH), first)
    torch.manual_seed(2)
    other = distiller.random_mask(maps, BATCH)
    torch.set_rng_state(before)
    assert torch.equal(distiller.random_mask(maps, BATCH), first)
    others = [
        other,
        distiller.random_mask(maps, DistillBatch([(40, 48)] * 2, iteration=6)),
        distiller.random_mask(maps._replace(level="p4"), BATCH),
    ]
    assert not any(torch.equal(x, first) for x in others)


def test_two_halves_of_a_batch_are_the_whole() -> None:
    # Without holes, which each process draws for itself.
    student, teacher = pair()
    for reference in ((), (2, 80, 160, 12)):
        distiller = bind(MGDDistiller(mask_ratio=0, reference=reference), 3)
        whole = distiller.level_loss(maps_of(student, teacher, MASK), BATCH)
        halves = [
            distiller.level_loss(maps_of(*(x[i : i + 1] for x in (student, teacher, MASK))), BATCH)
            for i in (0, 1)
        ]
        torch.testing.assert_close(sum(halves) / 2, whole)
