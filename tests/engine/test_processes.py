"""Two processes on a CPU: the same weights, the big batch's gradient, a common end."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.engine import inside
from tests.engine.runs import World, assert_same, checkpoint, children, metrics, wait_until
from tests.engine.test_methods import TERMS

SHORT = ("DATASETS.TEST", "()")
# Also methods with their own modules, optimizer and random numbers.
THREE = (
    *(*SHORT, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()", "MODEL.DISTILL.LOSS_WEIGHT", 1.0),
    *("MODEL.DISTILL.TERMS", json.dumps([["SSIMDistiller"], *TERMS])),
)


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory) -> Path:
    """Three steps of two processes, as torchrun would start them."""
    folder = tmp_path_factory.mktemp("two")
    line = world.arguments(folder, *THREE)
    with children(
        line, line, folder=folder, prepare=partial(inside.record_rank, str(folder))
    ) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    return folder


def test_train_two_processes_have_equal_weights(two: Path) -> None:
    first, second = (json.loads((two / f"rank{i}.json").read_text()) for i in (0, 1))
    assert first == second
    norms = [norm for name, norm in first["adapters"].items() if name.startswith("ssim.")]
    assert len(norms) == 10 and all(norm > 0 for norm in norms)
    # Every module of a method has a gradient.
    assert {name.split(".")[0] for name in first["adapters"]} == {"ssim", "icd", "drkd", "mgd"}
    assert checkpoint(two)["trainer"]["data"]["processes"] == 2


def test_one_process_reads_the_data_for_epochs(world: World, tmp_path) -> None:
    """For the schedule, the checks and the loader of both."""
    prepare = partial(inside.record_reads, str(tmp_path))
    line = world.arguments(tmp_path, *SHORT, "--epochs=1")
    with children(line, line, folder=tmp_path, prepare=prepare) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    assert (tmp_path / "reads.txt").read_text() == "rank 0: annotations.json\n"
    assert checkpoint(tmp_path)["iteration"] == 2


def test_train_slurm_equals_torchrun(world: World, two: Path, tmp_path) -> None:
    env = {
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{rank}",
        "SLURM_LOCALID": "{rank}",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(torch.randint(20000, ()).item()),
    }
    line = world.arguments(tmp_path, *THREE)
    with children(line, line, folder=tmp_path, env=env) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    assert_same(checkpoint(two), checkpoint(tmp_path))


def test_gradient_of_two_halves_is_that_of_the_whole(world: World, tmp_path) -> None:
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


def test_main_different_configs(world: World, tmp_path) -> None:
    lines = [world.arguments(tmp_path, "SOLVER.BASE_LR", lr) for lr in (0.01, 0.02)]
    with children(*lines, folder=tmp_path / "out") as ranks:
        assert [rank.wait(60) for rank in ranks] == [1, 1]
        expected = "The config of process 1 is not that of process 0: ['  BASE_LR: 0.02']"
        assert all(expected in rank.output for rank in ranks)
    assert not (tmp_path / "config.yaml").exists()


def test_main_different_flags(world: World, tmp_path) -> None:
    lines = [world.arguments(tmp_path, *flag) for flag in ((), ("--resume",))]
    with children(*lines, folder=tmp_path / "out") as ranks:
        assert [rank.wait(60) for rank in ranks] == [1, 1]
        assert all("'--resume': True" in rank.output for rank in ranks)


def test_train_sigterm_to_one_process(world: World, tmp_path) -> None:
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


def test_train_exception_in_one_process(world: World, tmp_path) -> None:
    line = world.arguments(tmp_path, *SHORT, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()")
    # In the last step, after which Detectron2 would evaluate as if nothing had been.
    prepare = partial(inside.fail_at, 2, 1)
    with children(line, line, folder=tmp_path, prepare=prepare) as ranks:
        codes = [rank.wait(60) for rank in ranks]
        assert all(code != 0 for code in codes), codes
        assert "injected failure" in ranks[1].output
        assert "Traceback" in ranks[0].output, "rank 0 says that it lost rank 1"


SCORES = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5)
TTA = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,)")


def predictions(folder: Path) -> dict[int, list[float]]:
    """Scores and boxes of each image, the surest first."""
    found: dict[int, list[list[float]]] = {}
    for x in json.loads((folder / "coco_instances_results.json").read_text()):
        found.setdefault(x["image_id"], []).append([-x["score"], *x["bbox"]])
    return {image: [v for row in sorted(rows) for v in row] for image, rows in found.items()}


def assert_same_predictions(first: Path, second: Path) -> None:
    ours, theirs = predictions(first), predictions(second)
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for image, values in ours.items():
        assert values == pytest.approx(theirs[image], abs=1e-3), image


def test_evaluation_of_two_processes_is_that_of_the_saved_file(world: World, tmp_path) -> None:
    """Plain and with TTA: a student whose norms train has other statistics on each process."""
    two, one = tmp_path / "two", tmp_path / "one"
    # The last evaluation comes twice: periodic in the first step, then at the end.
    options = (*SCORES, *TTA, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", 1)
    line = world.arguments(two, *options)
    with children(line, line, folder=two) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    results = world.main(
        one, "--eval-only", *SCORES, *TTA, "MODEL.WEIGHTS", two / "model_final.pth"
    )
    for name in ("inference", "inference_TTA"):
        assert_same_predictions(two / name, one / name)
    logged = metrics(two)[-1]
    for task in ("bbox", "bbox_TTA"):
        assert logged[f"{task}/AP"] == pytest.approx(results[task]["AP"], nan_ok=True)


def test_evaluation_of_the_teacher_by_two_processes_is_that_of_one(world: World, tmp_path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    scores = ("MODEL.DISTILL.TEACHER.OPTS", list(SCORES))
    line = world.arguments(two, "--eval-teacher", *scores)
    with children(line, line, folder=two) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    world.main(one, "--eval-teacher", *scores)
    assert_same_predictions(two / "teacher/inference", one / "teacher/inference")


def test_train_two_processes_resumed_loss_normalizer(world: World, tmp_path) -> None:
    """RetinaNet's running mean is another on each process."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()")
    options += ("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.BASE_LR", 0.001)
    line = world.arguments(whole, *options, config=world.retinanet)
    with children(line, line, folder=whole) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    saved = checkpoint(whole, "model_0000001")
    first, second = saved["trainer"]["hooks"]["RankStates"]["loss_normalizer"]
    assert first != second
    cut.mkdir()
    shutil.copy(whole / "model_0000001.pth", cut)
    line = world.arguments(cut, "--resume", *options, config=world.retinanet)
    with children(line, line, folder=cut) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    assert_same(checkpoint(whole), checkpoint(cut))


def test_train_parameters_without_gradient(world: World, tmp_path) -> None:
    """Levels that no loss uses: DDP itself names no parameter."""
    levels = ("MODEL.RPN.IN_FEATURES", "['p2']", "MODEL.ROI_HEADS.IN_FEATURES", "['p2']")
    options = (*SHORT, *levels, "MODEL.ANCHOR_GENERATOR.SIZES", "[[8]]", "SOLVER.MAX_ITER", 2)
    line = world.arguments(tmp_path, *options, "MODEL.DISTILL.ENABLED", "False")
    with children(line, line, folder=tmp_path) as ranks:
        assert [rank.wait(60) for rank in ranks] == [1, 1]
        for rank in ranks:
            assert "backbone.fpn_output3.weight" in rank.output and "MODEL.FPN" in rank.output
