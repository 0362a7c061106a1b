"""Memory, files, threads and processes are flat over 2,000 steps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.engine.runs import World, children
from tests.faults import tiny

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_train_two_thousand_steps(world: World, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pth"
    torch.save({"model": tiny.TinyDetector(None).state_dict()}, teacher)
    options = [
        *("MODEL.DISTILL.STUDENT_META_ARCHITECTURE", "TinyDetector"),
        *("MODEL.DISTILL.TEACHER.OPTS", "['MODEL.META_ARCHITECTURE','TinyDetector']"),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", teacher, "MODEL.DISTILL.SSIM.WINDOW_SIZE", 3),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2000, "SOLVER.STEPS", "(1500,)"),
        *("SOLVER.CHECKPOINT_PERIOD", 250, "SOLVER.CHECKPOINTS_TO_KEEP", 2),
        *("TEST.EVAL_PERIOD", 250, "VIS_PERIOD", 250, "DATALOADER.NUM_WORKERS", 1),
    ]
    seen = tmp_path / "seen.jsonl"
    prepare = partial(tiny.watch, str(seen), 125)
    line = world.arguments(tmp_path / "out", *options)
    with children(line, folder=tmp_path, prepare=prepare) as (run,):
        assert run.wait(500) == 0, run.output[-3000:]
    lines = [json.loads(text) for text in seen.read_text().splitlines()]
    assert [x["iteration"] for x in lines][-1] == 1999
    print(json.dumps(lines))
    # The first quarter warms up: allocators, the first evaluation, the writers' windows.
    settled = lines[4:]
    for what in ("files", "threads", "processes"):
        assert len({x[what] for x in settled}) == 1, (what, [x[what] for x in lines])
    tensors = [x["tensors"] for x in settled]
    assert max(tensors) - min(tensors) <= 2, tensors
    # A map of one step (batch 2, 8 channels, 12 x 12) kept in each would add 18 kB a step: 27 MB.
    growth = settled[-1]["kilobytes"] - settled[0]["kilobytes"]
    assert growth < 8000, [x["kilobytes"] for x in lines]
    assert len(list((tmp_path / "out").glob("model_0*.pth"))) == 2
