"""The statistics of a comparison: paired differences, intervals, exact tests, variances."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

#: Up to this many pairs all sign flips are counted; 2^20 is about a million.
MOST_PAIRS = 20


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one arm.

    Attributes:
        n: number of values.
        mean: of the values.
        sd: standard deviation of the sample (n - 1); NaN for one value.
    """

    n: int
    mean: float
    sd: float


@dataclass(frozen=True)
class Spread:
    """The two parts of the variance of students nested in teachers.

    Attributes:
        teachers: standard deviation between teachers, without what their students add to it; NaN
            for one teacher, or if no teacher has two students.
        students: standard deviation between the students of a teacher; NaN if none has two.
    """

    teachers: float
    students: float


@dataclass(frozen=True)
class Difference:
    """A paired difference of two arms.

    Attributes:
        n: number of pairs.
        mean: of the differences.
        sd: of the differences (n - 1); NaN for one pair.
        low, high: the t interval of the mean; NaN for one pair.
        p: two-sided, exact: the share of the 2^n ways to flip signs whose mean is as far from 0.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float


def summarise(values: Sequence[float]) -> Summary:
    """Return number, mean and standard deviation.

    Raises:
        ValueError: ``values`` is empty.

    Example:
        >>> summarise([1.0, 3.0])
        Summary(n=2, mean=2.0, sd=1.4142135623730951)
    """
    if not len(values):
        raise ValueError("values is empty: expected at least one.")
    x = np.asarray(values, dtype=np.float64)
    return Summary(len(x), float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan)


def spread(groups: Sequence[Sequence[float]]) -> Spread:
    """Return the two standard deviations of a one-way random-effects analysis of variance.

    Args:
        groups: the values of each teacher's students; groups may differ in size. Source: Searle,
            Casella & McCulloch, Variance Components (1992), 3.6.

    Example:
        >>> spread([[1.0, 3.0], [5.0, 7.0]])  # mean squares 16 and 2; (16 - 2) / 2
        Spread(teachers=2.6457513110645907, students=1.4142135623730951)
    """
    sizes = np.array([len(group) for group in groups])
    n, k = int(sizes.sum()), len(sizes)
    if n == k:
        return Spread(math.nan, math.nan)
    means = np.array([np.mean(group) for group in groups])
    within = sum(float(np.square(np.asarray(g) - np.mean(g)).sum()) for g in groups) / (n - k)
    if k == 1:
        return Spread(math.nan, math.sqrt(within))
    between = float((sizes * np.square(means - sizes @ means / n)).sum()) / (k - 1)
    size = (n - float(np.square(sizes).sum()) / n) / (k - 1)
    return Spread(math.sqrt(max(0.0, (between - within) / size)), math.sqrt(within))


def paired_difference(differences: Sequence[float], *, confidence: float = 0.95) -> Difference:
    """Return mean, t interval and exact sign-flip p of paired differences.

    Args:
        differences: one a pair, at least one and at most 20.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: too few or too many pairs.
    """
    if not 1 <= len(differences) <= MOST_PAIRS:
        raise ValueError(f"{len(differences)} pairs: expected 1 to {MOST_PAIRS}.")
    found = summarise(differences)
    half = math.nan
    if found.n > 1:
        half = float(stats.t.ppf(0.5 + confidence / 2, found.n - 1)) * found.sd / math.sqrt(found.n)
    return Difference(
        found.n,
        found.mean,
        found.sd,
        found.mean - half,
        found.mean + half,
        sign_flip_p(differences),
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact two-sided p of a mean of 0: each sign is as likely as the other.

    The least p that n pairs can give is 2 / 2^n.

    Example:
        >>> sign_flip_p([1.0, 2.0, 3.0])  # all eight signs, two of them as far from 0
        0.25
    """
    x = np.asarray(differences, dtype=np.float64)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
    # Sums of the same numbers in another order differ by rounding.
    slack = 1e-9 * float(np.abs(x).sum())
    return float(np.mean(np.abs(signs @ x) >= abs(float(x.sum())) - slack))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p values adjusted for being several, after Holm (1979).

    Example:
        >>> holm({"a": 0.01, "b": 0.04})
        {'a': 0.02, 'b': 0.04}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
