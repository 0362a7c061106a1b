"""The three ways to start a training, as real processes that get signals or lose one of them."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.engine import inside
from tests.engine.runs import World, checkpoint, wait_until
from tests.engine.ways import WAYS, processes
from tests.faults.history import assert_same_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def begun(folder: Path, steps: int = 2) -> None:
    path = folder / "steps_rank0.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= steps, 180)


def recording(folder: Path) -> partial:
    return partial(inside.record_steps, str(folder))


@pytest.mark.parametrize("way", WAYS)
class TestProcesses:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_stopped_and_resumed_equals_the_whole(self, way, number, world: World, tmp_path):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        settings = {"max_iter": 24, "checkpoint_period": 4, "config": world.retinanet}
        with processes(way, world, whole, prepare=recording(whole), **settings) as (run,):
            assert run.wait(300) == 0, run.output[-3000:]
        with processes(way, world, cut, prepare=recording(cut), **settings) as (run,):
            begun(cut, 6)
            run.signal(number)
            assert run.wait(60) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        assert not (cut / "model_final.pth").exists()
        again = ("--resume",)
        with processes(way, world, cut, *again, prepare=recording(cut), **settings) as (run,):
            assert run.wait(300) == 0, run.output[-3000:]
        again = assert_same_run(whole, cut)
        assert number == signal.SIGKILL or again == 0, "no step was lost"

    def test_sigterm_in_an_evaluation(self, way, world: World, tmp_path) -> None:
        slow = partial(inside.slow_evaluation, "evaluate", 0)
        settings = {"max_iter": 5, "eval_period": 2, "checkpoint_period": 1000}
        with processes(way, world, tmp_path, prepare=slow, **settings) as (run,):
            run.wait_for("COCOEvaluator.evaluate", 180)
            run.signal(signal.SIGTERM)
            assert run.wait(30) == 143, run.output[-3000:]
        assert checkpoint(tmp_path, "model_0000001")["iteration"] == 1

    def test_two_processes_have_equal_weights(self, way, world: World, tmp_path) -> None:
        prepare = partial(inside.record_rank, str(tmp_path))
        settings = {"max_iter": 2, "ranks": 2, "prepare": prepare}
        with processes(way, world, tmp_path, **settings) as ranks:
            assert [rank.wait(300) for rank in ranks] == [0, 0], ranks[1].output[-3000:]
        first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
        assert first == second
        assert checkpoint(tmp_path)["trainer"]["data"]["processes"] == 2

    def test_a_killed_rank_ends_the_others(self, way, world: World, tmp_path) -> None:
        settings = {"max_iter": 2000, "checkpoint_period": 5000, "ranks": 2}
        with processes(way, world, tmp_path, prepare=recording(tmp_path), **settings) as ranks:
            begun(tmp_path)
            ranks[1].signal(signal.SIGKILL)
            assert ranks[0].wait(60) not in (0, None)
            assert "Traceback" in ranks[0].output
