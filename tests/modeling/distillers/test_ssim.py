"""The SSIM distiller, and the name under which configs ask for the paper's losses."""

from __future__ import annotations

import math

import pytest
import torch

from ssim_kd.losses import ssim_loss
from ssim_kd.modeling import SSIMDistiller
from tests.level_maps import FULL, STRIDES, bind, features, make, maps_of
from tests.projects.maps import MethodOfMaps


class TestSSIM(MethodOfMaps):
    method = SSIMDistiller
    weights = (4.0, 4.0)
    bad = [
        ("weight", -1.0, "LOSS_WEIGHT"),
        ("weight", "much", "LOSS_WEIGHT"),
        ("scaling", "image", "SCALING"),
        ("ssim_options.window_size", 10, "SSIM.WINDOW_SIZE"),
        ("ssim_options.sigma", 0.0, "SSIM.SIGMA"),
        ("resize", "area", "RESIZE"),
        *(("level_weights", [1.0, value], "LEVEL_WEIGHTS") for value in (-2.0, math.nan, "a")),
    ]
    at_rest = is_mean = True

    def test_by_hand(self) -> None:
        # A single cell is 0 in both after scaling: SSIM 1, up to the epsilon. Without scaling, of
        # a window of one cell, it is l = (2 s t + C1) / (s^2 + t^2 + C1), C1 = 1e-4, and c = s = 1.
        student, teacher = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 1.0)
        options = {"window_size": 1}
        for scaling, ssim in (("channel", 1.0), ("none", (1 + 1e-4) / (1.25 + 1e-4))):
            distiller = bind(SSIMDistiller(scaling=scaling, ssim_options=options), 1)
            _, (found,) = distiller.pyramid_loss([maps_of(student, teacher)], None)
            assert float(found) == pytest.approx((1 - ssim) / 2, abs=1e-5)

    def formula(self, distiller, student, teacher, batch):
        """The one of tests/losses, which is held against kornia and against loops."""
        found = {}
        for level, stride in STRIDES.items():
            pair = (torch.tensor(x[level]) for x in (student, teacher))
            mask = batch.valid_mask(*student[level].shape[-2:], stride)
            found[level] = float(ssim_loss(*pair, mask=mask, scaling="channel", impl="reference"))
        return found


def test_scaling_grad_reaches_the_extrema_alone() -> None:
    gradients = []
    for through in (True, False):
        ours = {level: value.requires_grad_() for level, value in features(seed=0).items()}
        make(scaling_grad=through)(ours, features(seed=1), FULL)[0].backward()
        gradients.append(ours["p3"].grad)
    changed = (gradients[0] - gradients[1]).abs() > 1e-9
    # Only the extreme cells of each channel, two of them, feel the difference.
    assert set(changed.flatten(2).sum(-1).flatten().tolist()) == {2}


def test_levels_smaller_than_the_window_are_logged_once(caplog) -> None:
    caplog.set_level("INFO")
    distiller = make(ssim_options={"window_size": 9})
    for seed in (0, 2):
        distiller(features(seed=seed), features(seed=seed + 1), FULL)
    (message,) = [r.getMessage() for r in caplog.records if "window" in r.getMessage()]
    assert "p4" in message and "6 x 8" in message
