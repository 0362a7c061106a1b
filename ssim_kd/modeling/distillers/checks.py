"""Checks of the values of config keys."""

import math
from typing import Any


def check_weight(key: str, value: Any) -> float:
    """A weight of a loss as a float.

    Raises:
        ValueError: it is not a finite number >= 0.
    """
    return check_number(key, value, least=0)


def check_number(
    key: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A value of a config key as a float: finite, >= ``least``, > ``above``, < ``below``.

    Raises:
        ValueError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    within = number and (
        math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not within:
        bounds = ((">=", least), (">", above), ("<", below))
        expected = " and ".join(f"{sign} {x:g}" for sign, x in bounds if x is not None)
        raise ValueError(f"{key} is {value!r}; expected a finite number {expected}.")
    return float(value)
