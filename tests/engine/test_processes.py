"""Two processes on a CPU: the same weights, the big batch's gradient, a common end."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.engine import inside
from tests.engine.runs import World, assert_same, checkpoint, children, wait_until

SHORT = ("DATASETS.TEST", "()")


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory) -> Path:
    """Three steps of two processes, as torchrun would start them."""
    folder = tmp_path_factory.mktemp("two")
    line = world.arguments(folder, *SHORT, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()")
    with children(
        line, line, folder=folder, prepare=partial(inside.record_rank, str(folder))
    ) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    return folder


def test_both_ranks_have_the_same_weights_and_learn_from_the_teacher(two: Path) -> None:
    first, second = (json.loads((two / f"rank{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert len(first["adapters"]) == 10 and all(norm > 0 for norm in first["adapters"].values())
    assert checkpoint(two)["trainer"]["data"]["processes"] == 2


def test_slurm_is_the_same_as_torchrun(world: World, two: Path, tmp_path) -> None:
    env = {
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{rank}",
        "SLURM_LOCALID": "{rank}",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(torch.randint(20000, ()).item()),
    }
    line = world.arguments(tmp_path, *SHORT, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()")
    with children(line, line, folder=tmp_path, env=env) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    assert_same(checkpoint(two), checkpoint(tmp_path))


def test_half_the_batch_on_each_of_two_gives_the_gradient_of_the_whole(
    world: World, tmp_path
) -> None:
    # Frozen norms: a trainable batch norm sees other statistics in half a batch.
    cfgs = [
        world.cfg(
            tmp_path,
            "MODEL.RESNETS.NORM",
            "FrozenBN",
            "MODEL.FPN.NORM",
            "",
            "MODEL.DISTILL.LOSS",
            loss,
        )
        for loss in ("ssim", "l1", "l2")
    ]
    for cfg in cfgs:
        cfg.defrost()
        cfg.MODEL.DISTILL.TEACHER.WEIGHTS = str(world.teacher)
        cfg.freeze()
    torch.manual_seed(2)
    from detectron2.modeling import build_model

    weights = tmp_path / "start.pth"
    torch.save(build_model(cfgs[0]).state_dict(), weights)
    images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    prepare = partial(
        inside.gradient_of_half, cfgs, str(weights), images, str(tmp_path / "halves.pth")
    )
    with children(["--eval-only"], ["--eval-only"], folder=tmp_path, prepare=prepare) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    for cfg, half in zip(cfgs, torch.load(tmp_path / "halves.pth"), strict=True):
        whole = inside.distillation_gradient(cfg, str(weights), images)
        scale = max(float(g.abs().max()) for g in whole.values())
        assert scale > 1e-4
        worst = max(float((half[f"{n}"] - g).abs().max()) for n, g in whole.items())
        assert worst <= 1e-5 * max(scale, 1.0), (cfg.MODEL.DISTILL.LOSS, worst, scale)


def test_ranks_with_different_configs_stop(world: World, tmp_path) -> None:
    lines = [world.arguments(tmp_path, "SOLVER.BASE_LR", lr) for lr in (0.01, 0.02)]
    with children(*lines, folder=tmp_path / "out") as ranks:
        assert [rank.wait(60) for rank in ranks] == [1, 1]
        expected = "The config of process 1 is not that of process 0: ['  BASE_LR: 0.02']"
        assert all(expected in rank.output for rank in ranks)
    assert not (tmp_path / "config.yaml").exists()


def test_ranks_with_different_flags_stop(world: World, tmp_path) -> None:
    lines = [world.arguments(tmp_path, *flag) for flag in ((), ("--resume",))]
    with children(*lines, folder=tmp_path / "out") as ranks:
        assert [rank.wait(60) for rank in ranks] == [1, 1]
        assert all("'--resume': True" in rank.output for rank in ranks)


def test_sigterm_to_one_rank_saves_and_ends_both(world: World, tmp_path) -> None:
    line = world.arguments(
        tmp_path, *SHORT, "SOLVER.MAX_ITER", 1000, "SOLVER.CHECKPOINT_PERIOD", 1000
    )
    with children(
        line, line, folder=tmp_path, prepare=partial(inside.record_steps, str(tmp_path))
    ) as ranks:
        steps = tmp_path / "steps_rank1.jsonl"

        wait_until(lambda: steps.exists() and ranks[0].process.is_alive(), 90)
        ranks[1].signal(signal.SIGTERM)
        assert [rank.wait(30) for rank in ranks] == [143, 143]
    done = len(steps.read_text().splitlines())
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{done - 1:07d}.pth"
    assert checkpoint(tmp_path, f"model_{done - 1:07d}")["iteration"] == done - 1


def test_an_exception_in_one_rank_ends_both(world: World, tmp_path) -> None:
    line = world.arguments(tmp_path, *SHORT, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()")
    # In the last step, after which Detectron2 would evaluate as if nothing had been.
    prepare = partial(inside.fail_at, 2, 1)
    with children(line, line, folder=tmp_path, prepare=prepare) as ranks:
        codes = [rank.wait(60) for rank in ranks]
        assert all(code != 0 for code in codes), codes
        assert "injected failure" in ranks[1].output
        assert "Traceback" in ranks[0].output, "rank 0 says that it lost rank 1"
