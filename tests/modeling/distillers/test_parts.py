"""Methods whose loss has several parts: their weights, their names, what is logged."""

from __future__ import annotations

import math

import pytest
import torch

from ssim_kd.losses import masked_mean
from ssim_kd.modeling import PartsDistiller, check_number
from tests.modeling.distillers.maps import PADDED, bound, features


class L1AndL2(PartsDistiller):
    def level_parts(self, maps, batch):
        difference = maps.student - maps.teacher
        return {
            "l2": masked_mean(difference.square(), maps.mask),
            "l1": masked_mean(difference.abs(), maps.mask),
        }


def make(l1: float = 2.0, **options) -> L1AndL2:
    return L1AndL2(
        name="both", key="MODEL.DISTILL.BOTH", part_weights={"l1": l1, "l2": 3.0}, **options
    )


def test_forward_sums_parts_and_levels_by_their_weights() -> None:
    distiller = bound(make(level_weights=(0.5, 1.0)))
    ours, theirs = features(seed=0), features(seed=1)
    total, scalars = distiller(ours, theirs, PADDED)
    assert list(scalars) == ["p3_l1", "p3_l2", "p4_l1", "p4_l2"]
    expected = 0.0
    for level, weight in (("p3", 0.5), ("p4", 1.0)):
        parts = distiller.level_parts(
            distiller.align(level, ours[level], theirs[level], PADDED), PADDED
        )
        expected += weight * (2 * parts["l1"] + 3 * parts["l2"])
        torch.testing.assert_close(scalars[f"{level}_l1"], parts["l1"])
    torch.testing.assert_close(total, expected)
    assert distiller.scalar_weights == {"p3_l1": 1, "p3_l2": 1.5, "p4_l1": 2, "p4_l2": 3}
    assert not any(value.requires_grad for value in scalars.values())


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "much", True])
def test_a_weight_out_of_range(bad) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.BOTH\.L1_WEIGHT") as caught:
        make(l1=bad)
    assert repr(bad) in str(caught.value) and ">= 0" in str(caught.value)


def test_level_parts_must_be_defined() -> None:
    distiller = bound(PartsDistiller(name="none", key="KEY", part_weights={}))
    with pytest.raises(NotImplementedError, match="level_parts"):
        distiller.level_parts(None, PADDED)


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_check_number_within_its_bounds(value) -> None:
    found = check_number("KEY", value, least=0, below=2)
    assert found == value and isinstance(found, float)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({"above": 1}, "> 1"), ({"least": 2, "below": 3}, ">= 2 and < 3"), ({"below": 1}, "< 1")],
)
def test_check_number_beyond_its_bounds(bounds, expected) -> None:
    with pytest.raises(ValueError, match="KEY is 1;") as caught:
        check_number("KEY", 1, **bounds)
    assert expected in str(caught.value)
