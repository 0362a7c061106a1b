"""A training of six steps: what it writes, and that a resumed one is the same bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import hooks
from detectron2.modeling import build_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssim_kd.data import build_train_loader, ensure_digits, register_datasets
from ssim_kd.engine import DistillTrainer
from ssim_kd.engine.hooks import Reseed, SavedEvaluation
from ssim_kd.engine.signals import StopOnSignal
from tests.engine.runs import World, assert_same, checkpoint, log, metrics, save_random_detector
from tests.helpers import bfloat16_without_onednn

LEVELS = ("p2", "p3", "p4", "p5", "p6")


@pytest.fixture(scope="module")
def six(world: World, tmp_path_factory) -> Path:
    """Six steps; the seed is drawn."""
    folder = tmp_path_factory.mktemp("six")
    world.main(folder, "SEED", -1, "VIS_PERIOD", 3)
    return folder


def half_of(folder: Path, to: Path) -> Path:
    """What a run that was killed after three steps leaves."""
    shutil.copytree(
        folder, to, ignore=shutil.ignore_patterns("model_final.pth", "*5.pth", "*.lock")
    )
    (to / "last_checkpoint").write_text("model_0000002.pth")
    return to


def test_losses_by_level_reach_metrics_json_and_tensorboard(six: Path) -> None:
    last = next(line for line in metrics(six) if line["iteration"] == 5)
    names = [f"distill/ssim_{level}{end}" for level in LEVELS for end in ("", "_weighted")]
    for name in ["loss_distill", "total_loss", "loss_cls", "lr", "grad_norm", *names]:
        assert math.isfinite(last[name]), name
    assert last["loss_distill"] == pytest.approx(
        sum(last[f"distill/ssim_{level}_weighted"] for level in LEVELS), rel=1e-2
    )
    board = EventAccumulator(str(six), size_guidance={"images": 0}).Reload()
    assert {"loss_distill", *names} <= set(board.Tags()["scalars"])
    assert {f"distill/{level}" for level in LEVELS} <= set(board.Tags()["images"])


def test_the_checkpoint_is_that_of_a_plain_student(six: Path) -> None:
    saved = checkpoint(six)
    assert saved.keys() == {"model", "distiller", "trainer", "iteration"}
    cfg = get_cfg()
    cfg.merge_from_file(str(six / "student.yaml"))
    model = build_model(cfg)
    result = model.load_state_dict(saved["model"], strict=False)
    # Detectron2 makes pixel_mean and pixel_std of the config.
    assert not result.unexpected_keys and not result.missing_keys
    assert not any("teacher" in key for key in [*saved["model"], *saved["distiller"]])


def test_resumed_training_is_the_same_bit_for_bit(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    world.main(folder, "--resume", "SEED", -1, "VIS_PERIOD", 3)
    whole, resumed = checkpoint(six), checkpoint(folder)
    assert whole["trainer"]["data"]["seed"] == resumed["trainer"]["data"]["seed"]
    assert whole["trainer"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.001)
    assert_same(whole, resumed)


def test_a_resumed_run_differs_from_one_that_starts_anew(world: World, six: Path, tmp_path) -> None:
    """Holds the test above to account: the state that is restored does matter."""
    folder = half_of(six, tmp_path / "resumed")
    four = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()")
    world.main(folder, "--resume", *four)
    stranger = half_of(six, tmp_path / "stranger")
    state = checkpoint(stranger, "model_0000002")
    for value in state["trainer"]["optimizer"]["state"].values():
        value["momentum_buffer"].zero_()
    torch.save(state, stranger / "model_0000002.pth")
    world.main(stranger, "--resume", *four)
    with pytest.raises(AssertionError):
        assert_same(checkpoint(folder)["model"], checkpoint(stranger)["model"])


def test_retinanets_loss_normalizer_is_restored(world: World, tmp_path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "resumed"
    short = ("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()")
    world.main(whole, *short, config=world.retinanet)
    folder.mkdir()
    shutil.copy(whole / "model_0000000.pth", folder)
    world.main(folder, "--resume", *short, config=world.retinanet)
    assert checkpoint(whole)["trainer"]["loss_normalizer"] != 100.0
    assert_same(checkpoint(whole), checkpoint(folder))


def test_a_loader_that_cannot_be_resumed_is_refused(world: World, tmp_path) -> None:
    class Own(DistillTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, True))

    class OwnMapper(DistillTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, mapper=DatasetMapper(cfg, True))

    cfg = world.cfg(tmp_path)
    register_datasets(cfg)
    ensure_digits(cfg.DATASETS.TRAIN)
    with pytest.raises(
        TypeError,
        match=r"Own\.build_train_loader returned a .*expected .*ssim_kd\.data\.build_train",
    ):
        Own(cfg)
    OwnMapper(cfg)


def test_random_weights_are_told_where_they_are_started_from(world: World, tmp_path) -> None:
    options = ("MODEL.BACKBONE.FREEZE_AT", 1, "DATASETS.TEST", "()", "SOLVER.STEPS", "()")
    for number in (1, 2):
        world.main(tmp_path, "--resume", *options, "SOLVER.MAX_ITER", number)
    assert checkpoint(tmp_path)["iteration"] == 1
    assert log(tmp_path).count("MODEL.WEIGHTS is empty, so that the student starts from") == 1


def test_without_distillation_and_in_mixed_precision(world: World, tmp_path) -> None:
    missing = ("MODEL.DISTILL.TEACHER.WEIGHTS", "/nowhere.pth", "SOLVER.MAX_ITER", 2)
    world.main(tmp_path / "plain", "MODEL.DISTILL.ENABLED", "False", *missing)
    assert checkpoint(tmp_path / "plain").keys() == {"model", "trainer", "iteration"}
    assert not any("distill" in name for line in metrics(tmp_path / "plain") for name in line)

    with bfloat16_without_onednn():
        world.main(tmp_path / "amp", "SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", 2)
    saved = checkpoint(tmp_path / "amp")
    assert all(v.dtype != torch.bfloat16 for v in saved["model"].values())
    last = next(line for line in metrics(tmp_path / "amp") if line["iteration"] == 1)
    assert math.isfinite(last["loss_distill"])
    assert saved["trainer"]["grad_scaler"] == {}, "bfloat16 needs no scaler"


def test_another_learning_rate_on_resume_is_told(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    world.main(folder, "--resume", "SOLVER.BASE_LR", 0.02)
    assert "SOLVER.BASE_LR: 0.02 (was: 0.01)" in log(folder)
    started_with = json.loads(checkpoint(folder)["trainer"]["config"])
    assert started_with["SOLVER.BASE_LR"] == 0.01, "it is told again at the next resume"


def test_the_same_config_on_resume_is_not_remarked(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    world.main(folder, "--resume", "SEED", -1, "VIS_PERIOD", 3)
    assert "the config is not the one" not in log(folder)


def test_other_levels_on_resume_are_refused(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    with pytest.raises(ValueError, match=r"what .* holds under 'trainer' does not fit"):
        world.main(folder, "--resume", "MODEL.DISTILL.IN_FEATURES", "['p3']")
    assert "MODEL.DISTILL.IN_FEATURES: ['p3'] (was: [])" in log(folder)


def test_a_checkpoint_of_stock_detectron2_is_refused(world: World, tmp_path) -> None:
    plain = ("MODEL.DISTILL.ENABLED", "False", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    world.main(tmp_path, *plain)
    saved = checkpoint(tmp_path)
    saved["trainer"] = {"iteration": 0}
    torch.save(saved, tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match="written by another trainer"):
        world.main(tmp_path, "--resume", *plain)


def test_another_teacher_on_resume_is_refused(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    other = tmp_path / "other.pth"
    save_random_detector(world.teacher_config, other, seed=6)
    with pytest.raises(ValueError, match="was trained with the teacher of SHA-256"):
        world.main(folder, "--resume", "MODEL.DISTILL.TEACHER.WEIGHTS", other)


def test_other_classes_or_no_distiller_on_resume_are_refused(
    world: World, six: Path, tmp_path
) -> None:
    folder = half_of(six, tmp_path / "resumed")
    with pytest.raises(ValueError, match="does not fit the student"):
        world.main(folder, "--resume", "MODEL.ROI_BOX_HEAD.FC_DIM", 32)
    with pytest.raises(ValueError, match=r"has \['distiller'\] beside the config"):
        world.main(folder, "--resume", "MODEL.DISTILL.ENABLED", "False")


def test_nothing_left_to_train(world: World, six: Path, tmp_path) -> None:
    """The run was killed between its last periodic checkpoint and the final one."""
    folder = tmp_path / "resumed"
    shutil.copytree(six, folder, ignore=shutil.ignore_patterns("model_final.pth"))
    (folder / "last_checkpoint").write_text("model_0000005.pth")
    world.main(folder, "--resume")
    assert "nothing is left to train" in log(folder)
    assert_same(checkpoint(six), checkpoint(folder))


def test_resume_without_a_checkpoint_starts_anew_and_says_so(world: World, tmp_path) -> None:
    world.main(tmp_path, "--resume", "SOLVER.MAX_ITER", 1)
    assert f"No checkpoint in {tmp_path}: training starts anew" in log(tmp_path)


def test_order_of_the_hooks(world: World, tmp_path) -> None:
    from ssim_kd.data import register_datasets

    cfg = world.cfg(tmp_path, "TEST.EVAL_PERIOD", 3)
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    kinds = [type(hook) for hook in trainer._hooks]
    assert kinds[0] is Reseed
    order = [
        hooks.LRScheduler,
        StopOnSignal,
        hooks.PeriodicCheckpointer,
        SavedEvaluation,
        hooks.PeriodicWriter,
    ]
    assert [kind for kind in kinds if kind in order] == order
    modules = list(trainer.model.modules())
    assert not any(module is trainer.model.teacher.backbone for module in modules)
    ids = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert ids == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {id(p) for p in trainer.model.distiller.parameters()} <= ids
    assert not ids & {id(p) for p in trainer.model.teacher.backbone.parameters()}


def test_the_gradient_scaler_is_restored(world: World, tmp_path) -> None:
    """Float16 is for GPUs; its scaler's state travels as here."""
    from ssim_kd.data import register_datasets

    cfg = world.cfg(tmp_path)
    register_datasets(cfg)
    first, second = DistillTrainer(cfg), DistillTrainer(cfg)
    for trainer, scale in ((first, 8.0), (second, 2.0)):
        trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    second.load_state_dict(first.state_dict())
    assert second._trainer.grad_scaler.get_scale() == 8.0
