"""CWD: the KL divergence of the channels' softmax over the cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ssim_kd.projects.cwd import CWDDistiller, channel_kl
from tests.projects.float64 import cells, softmax
from tests.projects.maps import MethodOfMaps


class TestCWD(MethodOfMaps):
    method = CWDDistiller
    weights = (10.0, 5.0)
    options = {"temperature": 0.7}
    bad = [("temperature", value, "CWD.TEMPERATURE") for value in (0, -1.0, math.inf, "warm")]
    at_rest = is_mean = crops = True

    def test_by_hand(self) -> None:
        # softmax(T) = (3, 1) / 4, softmax(S) = (1, 1) / 2: KL = 3/4 log(3/2) + 1/4 log(1/2).
        student = torch.zeros(1, 1, 1, 2)
        teacher = torch.tensor([math.log(3), 0.0]).view(1, 1, 1, 2)
        expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        assert float(channel_kl(student, teacher, 1.0)) == pytest.approx(expected)
        # At tau = 2 the same probabilities come of twice the values; the loss is 4 times as large.
        assert float(channel_kl(student, 2 * teacher, 2.0)) == pytest.approx(4 * expected)

    def level_formula(self, distiller, level, student, teacher, batch):
        tau, total = distiller.temperature, 0.0
        for pair in zip(student, teacher, strict=True):
            q, p = (softmax(cells(x) / tau) for x in pair)
            total += (p * np.log(p / q)).sum(0).mean()
        return tau**2 * total / len(student)
