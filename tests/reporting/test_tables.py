"""Figures as the tables show them."""

from __future__ import annotations

import math

import pytest

from ssim_kd.reporting.runs import flatten
from ssim_kd.reporting.tables import number, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (0.0, "0.0"),
        (0.0123, "0.012"),
        (12.34, "12.3"),
        (-1.2, "−1.2"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (-0.04, "0.0"), (0.04, "0.0"), (0.06, "+0.1"), (-1.1, "−1.1")],
)
def test_signed(value: float | None, text: str) -> None:
    assert signed(value) == text


def test_flatten_takes_tuples_for_lists() -> None:
    assert dict(flatten({"a": {"b": ((1, 2), [3])}})) == {"a.b": [[1, 2], [3]]}
