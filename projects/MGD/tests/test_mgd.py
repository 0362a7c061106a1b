"""MGD: the teacher's map, generated from a student's with holes."""

from __future__ import annotations

import math

import torch

from ssim_kd.modeling import DistillBatch
from ssim_kd.projects.mgd import MGDDistiller
from tests.level_maps import STRIDES, bind, maps_of
from tests.projects.float64 import convolved
from tests.projects.maps import MethodOfMaps

BATCH = DistillBatch([(40, 48)] * 2, iteration=5)


class TestMGD(MethodOfMaps):
    method = MGDDistiller
    weights = (5e-7, 2e-5)
    options = {"mask_ratio": 0.4}
    bad = [
        *(("mask_ratio", value, "MGD.MASK_RATIO") for value in (1.0, -0.1, math.nan)),
        ("reference", [2, 800], "MGD.REFERENCE"),
    ]
    single = False  # The convolutions run in the training's precision.
    growth = {"": 3 * 4}

    def test_by_hand(self) -> None:
        # G adds 1, T - S = 3: (3 - 1)^2 in 2 channels and 30 cells. Without holes.
        distiller = bind(MGDDistiller(mask_ratio=0.0), 2)
        first, _, last = distiller.generators["p3"]
        for conv, bias in ((first, 0.0), (last, 1.0)):
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.constant_(conv.bias, bias)
        student = torch.ones(2, 2, 5, 6)
        loss = distiller.level_loss(maps_of(student, student + 3), BATCH)
        assert float(loss.detach()) == 4 * 2 * 30

    def formula(self, distiller, student, teacher, batch):
        found = {}
        for level, stride in STRIDES.items():
            maps = maps_of(*(torch.tensor(x[level]) for x in (student, teacher)), level=level)
            holes = distiller.random_mask(maps, batch).numpy()
            first, _, last = distiller.generators[level]
            total = 0.0
            pairs = zip(student[level] * holes, teacher[level], strict=True)
            for (s, t), (height, width) in zip(pairs, batch.image_sizes, strict=True):
                error = (convolved(last, convolved(first, s).clip(0)) - t) ** 2
                total += error[:, : -(-height // stride), : -(-width // stride)].sum()
            found[level] = total / len(teacher[level])
        return found


def test_the_mask_is_shared_by_the_channels_and_has_the_ratio() -> None:
    distiller = bind(MGDDistiller(mask_ratio=0.65), 3)
    maps = maps_of(torch.randn(2, 3, 100, 100), torch.randn(2, 3, 100, 100))
    holes = distiller.random_mask(maps, BATCH)
    assert holes.shape == (2, 1, 100, 100) and set(holes.unique().tolist()) == {0, 1}
    assert abs(float(holes.mean()) - 0.35) < 0.015
    assert not torch.equal(holes[0], holes[1])
    # It depends on seed, iteration, name and level; see DistillBatch.generator.
    assert torch.equal(distiller.random_mask(maps, BATCH), holes)
    later = DistillBatch([(40, 48)] * 2, iteration=6)
    for other in (
        distiller.random_mask(maps, later),
        distiller.random_mask(maps._replace(level="p4"), BATCH),
    ):
        assert not torch.equal(other, holes)
    assert bind(MGDDistiller(mask_ratio=0), 3).random_mask(maps, BATCH).all()
