"""Against numbers worked by hand and SciPy's own tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ssim_kd.comparing.statistics import holm, paired_difference, sign_flip_p, spread, summarise


def test_summarise_of_three() -> None:
    found = summarise([1.0, 2.0, 6.0])  # deviations -2, -1, 3: 14 / 2
    assert (found.n, found.mean, found.sd) == (3, 3.0, pytest.approx(math.sqrt(7)))


def test_summarise_of_one_has_no_spread() -> None:
    assert math.isnan(summarise([5.0]).sd)


def test_summarise_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        summarise([])


def test_paired_difference_by_hand() -> None:
    # Mean 2, SD 1, standard error 1 / sqrt(3); t(0.975, 2) = 4.302653.
    found = paired_difference([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd, found.p) == (3, 2.0, 1.0, 0.25)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


def test_paired_difference_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).normal(0.4, 1.0, 9)
    found = paired_difference(values.tolist(), confidence=0.9)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    flipped = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert found.p == pytest.approx(flipped.pvalue)


@pytest.mark.parametrize("n", [0, 21])
def test_paired_difference_of_too_few_or_many_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} pairs: expected 1 to 20"):
        paired_difference([1.0] * n)


@pytest.mark.parametrize(
    "groups, teachers, students",
    [
        # Means 2 and 6 of two each: mean squares 16 and 2.
        ([[1.0, 3.0], [5.0, 7.0]], math.sqrt(7), math.sqrt(2)),
        # Less between than within: none is left for the teachers.
        ([[0.0, 4.0], [1.0, 3.0]], 0.0, math.sqrt(5)),
        # Means 1, 3, 5 about 2.5: 2 x 2.25 + 0.25 + 6.25 = 11, / 2; size (4 - 6 / 4) / 2 = 1.25.
        ([[0.0, 2.0], [3.0], [5.0]], math.sqrt((5.5 - 2) / 1.25), math.sqrt(2)),
        ([[1.0, 3.0]], math.nan, math.sqrt(2)),
        ([[1.0], [3.0]], math.nan, math.nan),
    ],
)
def test_spread_by_hand(groups: list[list[float]], teachers: float, students: float) -> None:
    found = spread(groups)
    assert (found.teachers, found.students) == pytest.approx((teachers, students), nan_ok=True)


def test_spread_finds_what_it_was_drawn_with() -> None:
    random = np.random.default_rng(0)
    means = random.normal(0.0, 3.0, 2000)
    found = spread([random.normal(m, 0.5, random.integers(1, 4)).tolist() for m in means])
    assert (found.teachers, found.students) == pytest.approx((3.0, 0.5), rel=0.05)


@pytest.mark.parametrize(
    "differences, expected",
    [
        ([2.0], 1.0),
        ([1.0, 1.0], 0.5),
        # The sum is -4; of the eight sums +-6, +-5, +-4, +-3 two are nearer to 0.
        ([1.0, -0.5, -4.5], 6 / 8),
        ([3.0, 2.0, -1.0], 4 / 8),
        ([0.0, 0.0], 1.0),
        ([0.1] * 10, 2 / 1024),
    ],
)
def test_sign_flip_p_by_hand(differences: list[float], expected: float) -> None:
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_holm_by_hand() -> None:
    # 3 x 0.01; 2 x 0.02; then 0.03, which may not be below the one before.
    adjusted = holm({"c": 0.03, "a": 0.01, "b": 0.02})
    assert adjusted == pytest.approx({"c": 0.04, "a": 0.03, "b": 0.04})
    assert list(adjusted) == ["c", "a", "b"]


def test_holm_is_at_most_one() -> None:
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
