"""ReviewKD: fusions from the coarsest level down, and the hierarchical loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssim_kd.modeling import DistillBatch
from ssim_kd.projects.reviewkd import ReviewKDDistiller
from ssim_kd.projects.reviewkd.distiller import hierarchical_loss
from tests.level_maps import STRIDES, bind
from tests.projects.float64 import convolved, normed
from tests.projects.maps import MethodOfMaps


def fused(layer, images: np.ndarray) -> np.ndarray:
    """A convolution and its batch norm, over the whole maps (N, C, H, W)."""
    rows = np.moveaxis(np.stack([convolved(layer, x) for x in images]), 1, -1)
    return np.moveaxis(normed(layer.norm, rows, (0, 1, 2)), -1, 1)


def pooled_square(difference: np.ndarray, mask: np.ndarray, side: int) -> float:
    """Of an image: the mean over side x side bins of the squared mean of what counts in them."""
    height, width = mask.shape
    bins = []
    for i in range(side):
        for j in range(side):
            rows = slice(i * height // side, -(-(i + 1) * height // side))
            columns = slice(j * width // side, -(-(j + 1) * width // side))
            inside = mask[rows, columns]
            if inside.any():
                bins.append(difference[:, rows, columns][:, inside].mean(1))
    return float(np.square(bins).mean())


class TestReviewKD(MethodOfMaps):
    method = ReviewKDDistiller
    options = {"channels": 2}
    bad = [("channels", value, "REVIEWKD.CHANNELS") for value in (0, 2.5)]
    single = False  # The convolutions run in the training's precision.

    def test_by_hand(self) -> None:
        # Height 2: pooled to a single cell. Differences 1, 3, 1, 3: MSE 5; their mean 2: 4.
        student = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]])
        found = hierarchical_loss(student, torch.zeros_like(student))
        assert float(found) == pytest.approx((5 + 4 / 2) / (1 + 1 / 2))
        # Of one cell, nothing is pooled.
        assert float(hierarchical_loss(student[..., :1, :1], torch.zeros(1, 1, 1, 1))) == 1

    def formula(self, distiller, student, teacher, batch):
        found, above = {}, None
        for level in reversed(STRIDES):
            fusion = distiller.fusions[level]
            x = fused(fusion.reduce, student[level])
            if above is not None:
                rows, columns = (
                    np.arange(n) * m // n for n, m in zip(x.shape[2:], above.shape[2:], strict=True)
                )
                y = above[:, :, rows[:, None], columns]
                both = np.concatenate([x, y], axis=1)
                z = np.stack([convolved(fusion.attention, image) for image in both])
                z = 1 / (1 + np.exp(-z))
                x = x * z[:, :1] + y * z[:, 1:]
            above = x
            difference = fused(fusion.expand, x) - teacher[level]
            height, width = x.shape[2:]
            masks = batch.valid_mask(height, width, STRIDES[level]).numpy()
            total, factor, weights = 0.0, 1.0, 0.0
            # Pooled to its own size, that is, not at all.
            sides = [None, *(side for side in (4, 2, 1) if side < height)]
            for side in sides:
                values = [
                    (d[:, m] ** 2).mean() if side is None else pooled_square(d, m, side)
                    for d, m in zip(difference, masks, strict=True)
                ]
                total += factor * np.mean(values)
                weights += factor
                factor /= 2
            found[level] = total / weights
        return found


def test_a_norm_that_does_not_fit() -> None:
    for norm in ("XN", "GN"):
        with pytest.raises(ValueError, match=f"^norm is '{norm}' for 2 `channels`"):
            bind(ReviewKDDistiller(channels=2, norm=norm), 3, levels=STRIDES)


def test_the_optimum_is_0() -> None:
    # A level by itself: the fusion can give the teacher's map exactly.
    distiller = bind(ReviewKDDistiller(norm="", channels=3), 3)
    for convolution in (distiller.fusions["p3"].reduce, distiller.fusions["p3"].expand):
        torch.nn.init.dirac_(convolution.weight)
    maps = {"p3": torch.randn(1, 3, 6, 7)}
    assert float(distiller(maps, maps, DistillBatch([(48, 56)]))[0].detach()) == 0
