"""The l1 and l2 distillers."""

from __future__ import annotations

import numpy as np
import torch

from ssim_kd.modeling import DISTILLER_REGISTRY, LpDistiller
from tests.level_maps import bind, maps_of
from tests.projects.maps import MethodOfMaps


class TestL2(MethodOfMaps):
    method = DISTILLER_REGISTRY.get("L2Distiller")
    weights = (4.0, 4.0)
    bad = [("scaling", "image", "SCALING")]
    at_rest = is_mean = crops = True
    power, expected = 2, 3.5

    def test_by_hand(self) -> None:
        # |differences| 0, 1, 2, 3: their mean is 1.5, that of the squares (0 + 1 + 4 + 9) / 4.
        teacher = torch.arange(4.0).view(1, 1, 2, 2).expand(2, 4, 2, 2)
        distiller = bind(LpDistiller(loss=f"l{self.power}", scaling="none"), 4)
        assert distiller.level_loss(maps_of(0 * teacher, teacher), None) == self.expected

    def level_formula(self, distiller, level, student, teacher, batch):
        total = 0.0
        for pair in zip(student, teacher, strict=True):
            s, t = (x.reshape(len(x), -1) for x in pair)
            s, t = ((x - x.min(1, keepdims=True)) / (np.ptp(x, 1)[:, None] + 1e-6) for x in (s, t))
            total += (abs(s - t) ** self.power).mean() / len(student)
        return total


class TestL1(TestL2):
    method = DISTILLER_REGISTRY.get("L1Distiller")
    power, expected = 1, 1.5
