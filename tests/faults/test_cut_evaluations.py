"""Evaluations that SIGTERM cuts: all is saved before, and the resumed run makes them again."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.engine import inside
from tests.engine.runs import World, assert_same, checkpoint, children, metrics
from tests.faults.history import assert_same_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

OPTIONS = (
    *("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 50),
    *("TEST.EVAL_PERIOD", 3),
)
# Far less than the grace period.
SOON = 10


def prepare(folder: Path, *slow: object) -> partial:
    record = partial(inside.record_steps, str(folder))
    return partial(
        inside.all_of, [record, *([partial(inside.slow_evaluation, *slow)] * bool(slow))]
    )


def evaluated(folder: Path) -> dict[int, float]:
    return {line["iteration"]: line["bbox/AP"] for line in metrics(folder) if "bbox/AP" in line}


@pytest.mark.parametrize(("method", "workers"), [("process", 2), ("_eval_predictions", 0)])
def test_evaluation_cut_of_one_process(method, workers, world: World, tmp_path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = (*OPTIONS, "DATALOADER.NUM_WORKERS", workers)
    with children(world.arguments(whole, *options), folder=whole, prepare=prepare(whole)) as (run,):
        assert run.wait() == 0, run.output[-3000:]
    line = world.arguments(cut, "--resume", *options)
    with children(line, folder=cut, prepare=prepare(cut, method, 0)) as (run,):
        run.wait_for(f"COCOEvaluator.{method}", 180)
        begin = time.monotonic()
        run.signal(signal.SIGTERM)
        assert run.wait(SOON) == 143, run.output[-3000:]
        print(f"{method}: ended {time.monotonic() - begin:.1f} s after SIGTERM")
    assert (cut / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not evaluated(cut)
    with children(line, folder=cut, prepare=prepare(cut)) as (run,):
        assert run.wait() == 0, run.output[-3000:]
    assert assert_same_run(whole, cut) == 0, "no step was lost"
    assert len(evaluated(whole)) == 2 and evaluated(cut) == evaluated(whole)


@pytest.mark.parametrize(("method", "slow"), [("process", 1), ("process", 0), ("evaluate", 0)])
def test_evaluation_cut_of_two_processes(method, slow, world: World, tmp_path) -> None:
    """One waits for the other inside of torch."""
    line = world.arguments(tmp_path, *OPTIONS)
    with children(line, line, folder=tmp_path, prepare=prepare(tmp_path, method, slow)) as ranks:
        ranks[slow].wait_for(f"COCOEvaluator.{method}", 180)
        time.sleep(1)
        for rank in ranks:
            rank.signal(signal.SIGTERM)
        assert [rank.wait(SOON) for rank in ranks] == [143, 143], ranks[1 - slow].output[-3000:]
    assert checkpoint(tmp_path, "model_0000002")["iteration"] == 2


def test_evaluation_cut_the_last(world: World, tmp_path) -> None:
    options = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    line = world.arguments(tmp_path, "--resume", *options)
    slow = prepare(tmp_path, "_eval_predictions", 0)
    with children(line, folder=tmp_path, prepare=slow) as (run,):
        run.wait_for("COCOEvaluator._eval_predictions", 180)
        run.signal(signal.SIGTERM)
        assert run.wait(SOON) == 143
    before = checkpoint(tmp_path)
    with children(line, folder=tmp_path, prepare=prepare(tmp_path)) as (run,):
        assert run.wait() == 0, run.output[-3000:]
        assert "bbox" in run.output
    assert_same(before, checkpoint(tmp_path))
