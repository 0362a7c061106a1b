"""Methods whose loss has several parts: their weights, their names, what is logged."""

from __future__ import annotations

import math

import pytest
import torch

from ssim_kd.losses import masked_mean
from ssim_kd.modeling import PyramidDistiller, check_number, part_keys
from tests.level_maps import PADDED, TWO, bind, features


class L1AndL2(PyramidDistiller):
    keys = part_keys("BOTH", "l1", "l2")
    defaults = {"part_weights": {"l1": 2.0, "l2": 3.0}}

    def level_loss(self, maps, batch):
        difference = maps.student - maps.teacher
        return {
            "l1": masked_mean(difference.abs(), maps.mask),
            "l2": masked_mean(difference.square(), maps.mask),
        }


def test_forward_sums_parts_and_levels_by_their_weights() -> None:
    options = {"level_weights": (0.5, 1.0), "part_weights": {"l1": 4.0}}
    distiller = bind(L1AndL2(name="both", **options), 4, levels=TWO)
    ours, theirs = features(seed=0), features(seed=1)
    total, scalars = distiller(ours, theirs, PADDED)
    assert list(scalars) == ["p3_l1", "p3_l2", "p4_l1", "p4_l2"]
    expected = 0.0
    for level, weight in (("p3", 0.5), ("p4", 1.0)):
        maps = distiller.align(level, ours[level], theirs[level], PADDED)
        parts = distiller.level_loss(maps, PADDED)
        expected += weight * (4 * parts["l1"] + 3 * parts["l2"])
        torch.testing.assert_close(scalars[f"{level}_l1"], parts["l1"])
    torch.testing.assert_close(total, expected)
    weights = {key: distiller.scalar_weights[key] for key in scalars}
    assert weights == {"p3_l1": 2, "p3_l2": 1.5, "p4_l1": 4, "p4_l2": 3}
    assert not any(value.requires_grad for value in scalars.values())


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "much", True])
def test_a_weight_out_of_range(bad) -> None:
    with pytest.raises(ValueError, match=r"^part_weights\.l1 is ") as caught:
        L1AndL2(name="both", part_weights={"l1": bad})
    assert repr(bad) in str(caught.value) and ">= 0" in str(caught.value)


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_check_number_within_its_bounds(value) -> None:
    found = check_number("KEY", value, least=0, below=2)
    assert found == value and isinstance(found, float)


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (1, {"above": 1}, "> 1"),
        (1, {"least": 2, "below": 3}, ">= 2 and < 3"),
        (1, {"below": 1}, "< 1"),
        (1, {"most": 0}, "<= 0"),
        (1.0, {"least": 1, "whole": True}, "whole number >= 1"),
        (True, {"least": 0, "whole": True}, "whole number"),
    ],
)
def test_check_number_beyond_its_bounds(value, bounds, expected) -> None:
    with pytest.raises(ValueError, match=f"KEY is {value};") as caught:
        check_number("KEY", value, **bounds)
    assert expected in str(caught.value)
