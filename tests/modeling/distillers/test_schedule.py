"""The weight over the training, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
from detectron2.config import CfgNode

from ssim_kd.modeling.distillers.schedule import build_schedule
from tests.helpers import full_config

MAX_ITER = 1000


def config(**keys) -> CfgNode:
    """Of a schedule over 1000 iterations."""
    cfg = full_config()
    cfg.SOLVER.MAX_ITER = MAX_ITER
    for key, value in keys.items():
        assert key in cfg.MODEL.DISTILL.SCHEDULE
        cfg.MODEL.DISTILL.SCHEDULE[key] = value
    return cfg


LINEAR = {"NAME": "linear", "END_FACTOR": 0.5}
COSINE = {"NAME": "cosine", "END_FACTOR": 0.5}
STEP = {"NAME": "step", "STEPS": [600, 900], "GAMMA": 0.25}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {0: 8, 1: 8, 500: 8, 999: 8}),
        # From 8 to 4: a thousandth of the way is 0.004.
        (LINEAR, {0: 8, 1: 7.996, 500: 6, 750: 5, 999: 4.004}),
        ({"NAME": "linear"}, {0: 8, 500: 4, 999: 0.008}),
        ({"NAME": "linear", "END_FACTOR": 2.0}, {0: 8, 500: 12, 999: 15.992}),
        # 4 + 4 (1 + cos(pi t)) / 2; cos is 1/2 at a third of pi, -1/2 at two thirds.
        (COSINE, {0: 8, 250: 6 + math.sqrt(2), 500: 6, 750: 6 - math.sqrt(2)}),
        ({"NAME": "cosine"}, {0: 8, 250: 4 + 2 * math.sqrt(2), 500: 4}),
        (STEP, {0: 8, 599: 8, 600: 2, 899: 2, 900: 0.5, 999: 0.5}),
        # A warm-up grows from 0 to what the weight is at its end.
        ({"WARMUP_ITERS": 100}, {0: 0, 1: 0.08, 50: 4, 99: 7.92, 100: 8, 101: 8, 999: 8}),
        ({**LINEAR, "WARMUP_ITERS": 500}, {0: 0, 250: 3, 500: 6, 750: 5}),
        ({"STOP_ITER": 400}, {0: 8, 399: 8, 400: 0, 401: 0, 999: 0}),
        ({**LINEAR, "STOP_ITER": 750}, {0: 8, 500: 6, 749: 5.004, 750: 0, 999: 0}),
        (
            {**STEP, "WARMUP_ITERS": 100, "STOP_ITER": 950},
            {0: 0, 50: 4, 100: 8, 600: 2, 900: 0.5, 949: 0.5, 950: 0, 999: 0},
        ),
        # No stop at all, and one at the very end.
        ({"STOP_ITER": 0}, {0: 8, 999: 8}),
        ({"STOP_ITER": MAX_ITER}, {0: 8, 999: 8}),
        ({"WARMUP_ITERS": 999}, {0: 0, 333: 8 / 3, 999: 8}),
    ],
)
def test_build_schedule_by_hand(keys, expected) -> None:
    schedule = build_schedule(config(**keys), 8.0)
    found = {iteration: schedule(iteration / MAX_ITER) for iteration in expected}
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("total", [7, 1000, 270_000])
def test_build_schedule_changes_at_the_very_iteration(total) -> None:
    cfg = config(NAME="step", STEPS=[total // 2], STOP_ITER=total - 1)
    cfg.SOLVER.MAX_ITER = total
    schedule = build_schedule(cfg, 8.0)
    half = total // 2
    iterations = (half - 1, half, total - 2, total - 1)
    found = [schedule(iteration / total) for iteration in iterations]
    assert found == pytest.approx([8, 0.8, 0.8, 0])


@pytest.mark.parametrize(
    ("keys", "key", "value"),
    [
        ({"NAME": "exponential"}, "SCHEDULE.NAME", "'exponential'"),
        ({"END_FACTOR": -0.5}, "SCHEDULE.END_FACTOR", "-0.5"),
        ({"END_FACTOR": math.inf}, "SCHEDULE.END_FACTOR", "inf"),
        ({"WARMUP_ITERS": -1}, "SCHEDULE.WARMUP_ITERS", "-1"),
        ({"WARMUP_ITERS": 1000}, "SCHEDULE.WARMUP_ITERS", "1000"),
        ({"STOP_ITER": -1}, "SCHEDULE.STOP_ITER", "-1"),
        ({"STOP_ITER": 1001}, "SCHEDULE.STOP_ITER", "1001"),
        ({"NAME": "step"}, "SCHEDULE.STEPS", "[]"),
        ({"NAME": "step", "STEPS": [0]}, "SCHEDULE.STEPS", "[0]"),
        ({"NAME": "step", "STEPS": [1000]}, "SCHEDULE.STEPS", "[1000]"),
        ({"NAME": "step", "STEPS": [600, 500]}, "SCHEDULE.STEPS", "[600, 500]"),
        ({"NAME": "step", "STEPS": [500, 500]}, "SCHEDULE.STEPS", "[500, 500]"),
        ({"NAME": "step", "STEPS": [500], "GAMMA": -0.1}, "SCHEDULE.GAMMA", "-0.1"),
        ({"NAME": "step", "STEPS": [500], "GAMMA": math.nan}, "SCHEDULE.GAMMA", "nan"),
    ],
)
def test_build_schedule_of_a_bad_value_names_key_and_value(keys, key, value) -> None:
    with pytest.raises(ValueError) as caught:
        build_schedule(config(**keys), 8.0)
    assert f"MODEL.DISTILL.{key} is {value}" in str(caught.value)
