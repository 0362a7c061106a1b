"""Killed anywhere, resumed exactly."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.engine import inside
from tests.engine.runs import Child, World, children, wait_until
from tests.faults.history import assert_same_run, steps

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

# Kills of one process and of two. Each kill is of a run that was resumed after the one before.
KILLS, KILLS_OF_TWO = int(os.environ.get("SSIM_KD_KILLS", "24")), 8
OPTIONS = (
    *("SOLVER.MAX_ITER", 24, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.STEPS", "(15,)"),
    *("TEST.EVAL_PERIOD", 5, "SOLVER.CHECKPOINTS_TO_KEEP", 3),
)


def prepare(folder: Path) -> partial:
    record = partial(inside.record_steps, str(folder))
    # Longer writes are hit more often.
    return partial(inside.all_of, [record, partial(inside.slow_writes, 0.03)])


def kill(ranks: list[Child], folder: Path, kind: str, dice: random.Random) -> bool:
    """Kill all ranks at a random moment of some kind; False if they had ended before."""
    main = ranks[0]

    def over() -> bool:
        return not main.process.is_alive()

    def writing() -> bool:
        return any(name.endswith(".tmp") for name in os.listdir(folder))

    def done() -> int:
        recorded = folder / "steps_rank0.jsonl"
        return recorded.read_bytes().count(b"\n") if recorded.exists() else 0

    if kind == "anywhere":
        end = done() + dice.randint(1, 9)
        wait_until(lambda: over() or done() >= end, 120)
        time.sleep(dice.uniform(0, 0.3))
    else:
        # Some of these moments, not always the first.
        for _ in range(dice.randint(1, 2)):
            if kind == "write":
                wait_until(lambda: over() or writing(), 120)
                moment = time.monotonic() + dice.uniform(0, 0.04)
                wait_until(lambda m=moment: over() or time.monotonic() > m, 1)
            else:
                seen = main.output.count("Start inference")
                wait_until(lambda s=seen: over() or main.output.count("Start inference") > s, 120)
                time.sleep(dice.uniform(0, 0.15))
    alive = not over()
    for rank in ranks:
        if rank.process.is_alive():
            rank.signal(signal.SIGKILL)
    codes = [rank.wait(60) for rank in ranks]
    return alive and codes[0] == -signal.SIGKILL


def trials(
    world: World, folder: Path, *, number: int, ranks: int, seed: int
) -> tuple[Counter, int, int, int]:
    """Kill and resume runs until so many kills are done; compare each with one never killed.

    Returns:
        kills by kind, files found half written, steps done again, runs.
    """
    whole = folder / "whole"
    line = world.arguments(whole, *OPTIONS)
    with children(*[line] * ranks, folder=whole, prepare=prepare(whole)) as found:
        assert [child.wait(300) for child in found] == [0] * ranks, found[0].output[-3000:]
    dice = random.Random(seed)
    kills: Counter = Counter()
    half_written = again = runs = 0
    while kills.total() < number:
        killed = folder / f"killed{runs}"
        runs += 1
        killed.mkdir()
        line = world.arguments(killed, "--resume", *OPTIONS)
        ended = False
        for _ in range(6):
            kind = dice.choice(["anywhere", "evaluation", "write"])
            with children(*[line] * ranks, folder=killed, prepare=prepare(killed)) as found:
                hit = kill(found, killed, kind, dice)
            if not hit:
                assert found[0].process.exitcode == 0, found[0].output[-3000:]
                ended = True
                break
            kills[kind] += 1
            half_written += any(name.endswith(".tmp") for name in os.listdir(killed))
        if not ended:
            with children(*[line] * ranks, folder=killed, prepare=prepare(killed)) as found:
                codes = [child.wait(300) for child in found]
                assert codes == [0] * ranks, found[0].output[-3000:]
        again += assert_same_run(whole, killed, ranks=ranks)
        assert not list(killed.glob("*.tmp"))
    return kills, half_written, again, runs


def test_resume_killed_one_process(world: World, tmp_path: Path, record_property) -> None:
    kills, half, again, runs = trials(world, tmp_path, number=KILLS, ranks=1, seed=1)
    print(f"{dict(kills)}: {half} files half written, {again} steps done again, {runs} runs")
    assert kills.total() >= KILLS and len(kills) == 3 and half > 0 and again > 0


def test_resume_killed_two_processes(world: World, tmp_path: Path) -> None:
    kills, half, again, runs = trials(world, tmp_path, number=KILLS_OF_TWO, ranks=2, seed=2)
    print(f"{dict(kills)}: {half} files half written, {again} steps done again, {runs} runs")
    assert kills.total() >= KILLS_OF_TWO and again > 0


def test_resume_from_two_processes_to_one(world: World, tmp_path: Path) -> None:
    """State and learning rates go on; the order of images is another, and the log says so."""
    options = ("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.STEPS", "(6,)")
    line = world.arguments(tmp_path, "--resume", *options, "DATASETS.TEST", "()")
    record = partial(inside.record_steps, str(tmp_path))
    with children(line, line, folder=tmp_path, prepare=record) as ranks:
        wait_until(lambda: (tmp_path / "model_0000003.pth").exists(), 120)
        for rank in ranks:
            rank.signal(signal.SIGKILL)
        assert [rank.wait() for rank in ranks] == [-9, -9]
    with children(line, folder=tmp_path, prepare=record) as (single,):
        assert single.wait() == 0, single.output[-3000:]
        assert "The interrupted run had processes = 2, this one has 1" in single.output
    found = steps(tmp_path)
    assert sorted(found) == list(range(8))
    last = [found[i][-1] for i in range(4, 8)]
    assert all(len(step["images"]) == 4 for step in last), "the batch is as large as before"
    assert [step["lr"][0] for step in last][-1] == pytest.approx(0.001)
