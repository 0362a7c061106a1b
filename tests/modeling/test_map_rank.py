"""The effective rank of a teacher's maps."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from ssim_kd.modeling.map_rank import IMAGES, ChannelMoments, MapRanks, log_ranks


def effective_rank(maps: list[torch.Tensor]) -> float:
    moments = ChannelMoments()
    for each in maps:
        moments.add(each)
    return moments.effective_rank()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_copies_of_one_map_have_rank_one(channels: int) -> None:
    one = torch.randn(3, 1, 6, 7)
    assert effective_rank([one.repeat(1, channels, 1, 1)]) == pytest.approx(1)


def test_orthogonal_channels_have_full_rank_and_weights_lower_it() -> None:
    # Four cells, two channels of covariance 0: (1, 1, -1, -1) and (1, -1, 1, -1).
    maps = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [1.0, -1.0]]]])
    assert effective_rank([maps]) == pytest.approx(2)
    # Shares of the variance 0.9 and 0.1: exp(0.9 ln(1/0.9) + 0.1 ln(1/0.1)) = 1.3841.
    maps[:, 0] *= 3
    assert effective_rank([maps]) == pytest.approx(1.3841, abs=1e-4)


def test_maps_one_by_one_and_of_several_sizes_count_by_cells() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(1, 4, 5, size) * torch.arange(1, 5).view(1, 4, 1, 1) + 3 for size in (6, 9)]
    values = torch.linalg.eigvalsh(torch.cov(torch.cat([m[0].flatten(1) for m in maps], 1)))
    shares = values / values.sum()
    assert effective_rank(maps) == pytest.approx(float((-shares * shares.log()).sum().exp()), 1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_a_level_that_does_not_vary_has_rank_one(value: float) -> None:
    assert effective_rank([torch.full((2, 3, 7, 9), value)]) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_maps_that_are_not_finite_have_none(value: float) -> None:
    # The step that has them ends the training, by another error.
    maps = torch.randn(2, 3, 7, 9)
    maps[1, 2, 0, 0] = value
    assert math.isnan(effective_rank([maps]))


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone(images)


class Backbone(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"p2": images, "p3": images[:, :1].repeat(1, 3, 1, 1)}


def test_it_is_logged_once_and_the_model_is_left_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Detector()
    log_ranks(model)
    with caplog.at_level(logging.INFO):
        for size in (80, 90):  # of every size
            for _ in range(IMAGES):
                model(torch.randn(1, 3, size, size))
    (record,) = [r for r in caplog.records if "Effective rank" in r.getMessage()]
    assert "p2 3.0 of 3, p3 1.0 of 3" in record.getMessage()
    assert not model.backbone._forward_hooks


def test_what_is_no_map_is_left_out() -> None:
    ranks = MapRanks()
    maps = {"p2": torch.randn(2, 3, 9, 9), "proposals": [1], "scores": torch.randn(2, 3)}
    found = [ranks.add(maps) for _ in range(IMAGES)]  # of two images each
    assert list(found[IMAGES // 2 - 1]) == ["teacher_rank/p2"] and sum(map(bool, found)) == 1
    assert MapRanks().add({"proposals": [1]}) == {}


def test_a_model_without_maps_is_left_alone() -> None:
    model = nn.Module()
    log_ranks(model)
    assert not model._forward_hooks
