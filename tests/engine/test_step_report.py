"""The report of a step: what is not finite, in which order; the wish to stop; the iteration."""

from __future__ import annotations

import math

import torch
from detectron2.utils.events import EventStorage

from ssim_kd.engine.writers import StepReport

NAN = float("nan")


def report(**values: float) -> StepReport:
    def pick(start: str) -> dict[str, torch.Tensor]:
        return {k: torch.tensor(v) for k, v in values.items() if k.startswith(start)}

    found = StepReport(
        7,
        losses=pick("loss"),
        metrics=pick("metric"),
        health=pick("health"),
        stop=values.get("stop", 0) > 0,
        data_time=0.5,
        images=["a"],
    )
    found.read()
    return found


def test_not_finite_order() -> None:
    found = report(metric_a=NAN, loss_b=math.inf, loss_ok=1.0, health_c=NAN, health_ok=0.0)
    assert found.not_finite() == ["health_c", "loss_b", "metric_a"]
    assert report(loss=1.0).not_finite() == []


def test_read_stop() -> None:
    assert report(loss=1.0, stop=1).stop and not report(loss=1.0).stop
    assert "stop" not in report(loss=1.0, stop=1).values


def test_log_keeps_the_iteration() -> None:
    with EventStorage(9) as storage:
        report(loss=1.5).log(storage)
        assert storage.iter == 9
    assert storage.history("loss").values() == [(1.5, 7)]
    assert storage.history("data_time").latest() == 0.5
