"""Trainings by methods with their own modules, optimizer and random numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.runs import World, assert_same, checkpoint, metrics

TERMS = [
    ["ICDDistiller", "ICD.DIM", 16, "ICD.HEADS", 2, "ICD.DETACH_ITERS", 1],
    ["DRKDDistiller", "DRKD.NODES", [4, 4, 4, 4, 4]],
    ["MGDDistiller", "LOSS_WEIGHT", "auto"],
]
OPTIONS = (
    *("DATASETS.TEST", "()", "SOLVER.STEPS", "()", "SOLVER.MAX_ITER", 4),
    *("MODEL.DISTILL.LOSS_WEIGHT", 1.0, "MODEL.DISTILL.TERMS", json.dumps(TERMS)),
)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    world.main(folder, *OPTIONS, "SOLVER.CHECKPOINT_PERIOD", 2)
    return folder


def test_train_with_methods_logs_their_parts(whole: Path) -> None:
    last = metrics(whole)[-1]
    parts = [f"icd_{part}" for part in ("value", "real", "sides")]
    parts += ["drkd_p2_pixel", "drkd_p3_relation", "drkd_p2_instance", "mgd_p5"]
    parts += ["mgd_weight", "mgd_share"]
    assert all(last[f"distill/{part}"] > 0 for part in parts)
    saved = checkpoint(whole)
    prefixes = {name.split(".")[0] for name in saved["distillers"]}
    assert prefixes == {"icd", "drkd", "mgd"}
    # SGD of the student and of two methods; AdamW of the third.
    sgd, adamw = saved["trainer"]["optimizer"]["optimizers"]
    assert "momentum_buffer" in sgd["state"][0] and "exp_avg_sq" in adamw["state"][0]
    assert not any(name.startswith(tuple(prefixes)) for name in saved["model"])


def test_train_with_methods_resumed_equals_the_whole(world: World, whole: Path, tmp_path) -> None:
    folder = tmp_path / "resumed"
    left_out = shutil.ignore_patterns("model_final.pth", "*3.pth", "*.lock")
    shutil.copytree(whole, folder, ignore=left_out)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    world.main(folder, "--resume", *OPTIONS, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert_same(checkpoint(whole), checkpoint(folder))


def test_train_by_a_name_alone_writes_what_is_the_methods_own(world: World, tmp_path) -> None:
    own = tmp_path / "own.yaml"
    # Weight and levels of a file belong to the method that it names.
    values = 'NAME: "SSIMDistiller", LOSS_WEIGHT: 8.0, IN_FEATURES: ["p3"]'
    own.write_text(f"_BASE_: {world.config}\nMODEL: {{DISTILL: {{{values}}}}}\n")
    opts = ("MODEL.DISTILL.NAME", "MGDDistiller", "SOLVER.MAX_ITER", 1)
    world.main(tmp_path / "run", *OPTIONS[:4], *opts, config=own)
    logged = metrics(tmp_path / "run")[-1]
    assert logged["distill/mgd_p5_weighted"] == pytest.approx(5e-7 * logged["distill/mgd_p5"])
    distill = world.cfg(tmp_path, config=tmp_path / "run" / "config.yaml").MODEL.DISTILL
    assert (distill.LOSS_WEIGHT, distill.MGD.MASK_RATIO) == (5e-7, 0.45)
    assert (distill.IN_FEATURES, distill.ADAPTER) == (["p2", "p3", "p4", "p5"], "auto")
