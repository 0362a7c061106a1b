"""A training of six steps: what it writes, and that a resumed one is the same bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils.events import EventWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssim_kd.data import build_train_loader, register_datasets
from ssim_kd.engine import DistillTrainer
from ssim_kd.engine import trainer as trainer_module
from ssim_kd.engine.hooks import Reseed, SavedEvaluation
from ssim_kd.engine.signals import StopOnSignal
from ssim_kd.engine.writers import GuardedWriter, PeriodicWriter
from tests.engine.runs import World, assert_same, checkpoint, log, metrics
from tests.helpers import bfloat16_without_onednn

LEVELS = ("p2", "p3", "p4", "p5", "p6")


@pytest.fixture(scope="module")
def six(world: World, tmp_path_factory) -> Path:
    """Six steps; the seed is drawn."""
    folder = tmp_path_factory.mktemp("six")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssim_kd.modeling.map_rank.IMAGES", 2)
        world.main(folder, "SEED", -1, "VIS_PERIOD", 3)
    return folder


def half_of(folder: Path, to: Path) -> Path:
    """What a run that was killed after three steps leaves."""
    shutil.copytree(
        folder, to, ignore=shutil.ignore_patterns("model_final.pth", "*5.pth", "*.lock")
    )
    (to / "last_checkpoint").write_text("model_0000002.pth")
    return to


def test_train_logs_losses_by_level(six: Path) -> None:
    last = next(line for line in metrics(six) if line["iteration"] == 5)
    names = [f"distill/ssim_{level}{end}" for level in LEVELS for end in ("", "_weighted")]
    for name in ["loss_distill", "total_loss", "loss_cls", "lr", "grad_norm", *names]:
        assert math.isfinite(last[name]), name
    assert last["loss_distill"] == pytest.approx(
        sum(last[f"distill/ssim_{level}_weighted"] for level in LEVELS), rel=1e-2
    )
    ranks = {f"teacher_rank/{level}" for level in LEVELS}
    assert all(1 < next(line[rank] for line in metrics(six) if rank in line) < 48 for rank in ranks)
    board = EventAccumulator(str(six), size_guidance={"images": 0}).Reload()
    assert {"loss_distill", *names, *ranks} <= set(board.Tags()["scalars"])
    assert {f"distill/{level}" for level in LEVELS} <= set(board.Tags()["images"])


def test_train_saves_a_plain_student(six: Path) -> None:
    saved = checkpoint(six)
    assert saved.keys() == {"model", "distillers", "trainer", "iteration"}
    cfg = get_cfg()
    cfg.merge_from_file(str(six / "student.yaml"))
    model = build_model(cfg)
    result = model.load_state_dict(saved["model"], strict=False)
    # Detectron2 makes pixel_mean and pixel_std of the config.
    assert not result.unexpected_keys and not result.missing_keys
    assert not any("teacher" in key for key in [*saved["model"], *saved["distillers"]])


def test_train_resumed_equals_the_whole(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    world.main(folder, "--resume", "SEED", -1, "VIS_PERIOD", 3)
    whole, resumed = checkpoint(six), checkpoint(folder)
    assert whole["trainer"]["data"]["seed"] == resumed["trainer"]["data"]["seed"]
    assert whole["trainer"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.001)
    assert_same(whole, resumed)
    assert "--resume: the config" not in log(folder)


def test_train_resumed_from_an_unnamed_distiller(world: World, six: Path, tmp_path) -> None:
    """Before there could be several distillers, the only one was stored without its name."""
    folder = half_of(six, tmp_path / "resumed")
    path = folder / "model_0000002.pth"
    saved = torch.load(path, weights_only=False)
    named = saved.pop("distillers")
    saved["distiller"] = {key.removeprefix("ssim."): value for key, value in named.items()}
    assert saved["distiller"].keys().isdisjoint(named)
    torch.save(saved, path)
    world.main(folder, "--resume", "SEED", -1, "VIS_PERIOD", 3)
    assert_same(checkpoint(six), checkpoint(folder))


def test_train_resumed_precise_statistics(world: World, tmp_path) -> None:
    """TEST.PRECISE_BN: its images depend on the iteration, not on where the run began."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.STEPS", "()")
    options += ("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", 2, "SEED", -1)
    options += ("TEST.EVAL_PERIOD", 2, "MODEL.DISTILL.ENABLED", "False")
    world.main(whole, *options)
    first, last = checkpoint(whole, "model_0000001"), checkpoint(whole)
    name = "backbone.bottom_up.stem.conv1.norm.running_mean"
    assert not torch.equal(first["model"][name], last["model"][name])
    cut.mkdir()
    shutil.copy(whole / "model_0000001.pth", cut)
    (cut / "last_checkpoint").write_text("model_0000001.pth")
    world.main(cut, "--resume", *options)
    assert_same(last, checkpoint(cut))


class Best(HookBase):
    """A user's hook with a state as NumPy gives it."""

    def __init__(self) -> None:
        self.steps = np.int64(0)

    def after_step(self) -> None:
        self.steps = self.steps + 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": np.mean([1.0, 2.0])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = np.int64(state["steps"])


class CountBoxes(DatasetEvaluator):
    """A user's evaluator."""

    def reset(self) -> None:
        self.boxes = 0

    def process(self, inputs: Any, outputs: Any) -> None:
        self.boxes += sum(len(output["instances"]) for output in outputs)

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {"boxes": {"number": float(self.boxes)}}


class Offline(EventWriter):
    """A user's tracker."""

    calls = 0

    def write(self) -> None:
        Offline.calls += 1
        raise ConnectionError("the tracker is offline")


class UserTrainer(DistillTrainer):
    """As users of DefaultTrainer write theirs."""

    @classmethod
    def build_train_loader(cls, cfg):
        augmentations = [T.ResizeShortestEdge(96), T.RandomFlip()]
        mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return CountBoxes()

    def build_hooks(self):
        found = super().build_hooks()
        found.insert(0, Best())
        return found

    def build_writers(self):
        return [*super().build_writers(), GuardedWriter(Offline())]


def test_subclass_with_detectron2s_loader(world: World, tmp_path) -> None:
    """The user's loaders, mapper, evaluator, hooks and writers; resumed with a warning."""
    options = ("TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.STEPS", "()")
    options += ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,)")
    world.main(tmp_path, *options, "SOLVER.MAX_ITER", 3, trainer=UserTrainer)
    assert {"boxes/number", "boxes_TTA/number"} <= metrics(tmp_path)[-1].keys()
    warned = [line for line in log(tmp_path).splitlines() if "WARNING" in line]
    # After each evaluation, and with the losses of its step.
    rows = {row["iteration"]: row for row in metrics(tmp_path)}
    assert {"boxes/number", "total_loss"} <= rows[1].keys() and "boxes/number" in rows[3]
    assert sum("UserTrainer.build_train_loader" in line for line in warned) == 1
    assert Offline.calls == 1 and sum("ConnectionError" in line for line in warned) == 1
    saved = checkpoint(tmp_path)
    assert saved["trainer"]["hooks"]["Best"] == {"steps": 3, "mean": 1.5}
    assert saved["trainer"]["data"] == {"seed": 1}

    world.main(tmp_path, "--resume", *options, "SOLVER.MAX_ITER", 4, trainer=UserTrainer)
    assert checkpoint(tmp_path)["trainer"]["hooks"]["Best"]["steps"] == 4
    assert "--resume: the training loader" in log(tmp_path)


def test_tta_that_fails_leaves_the_plain_results(world: World, tmp_path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of TTA")

    monkeypatch.setattr(trainer_module, "test_time_augmentation", fail)
    options = ("TEST.AUG.ENABLED", "True", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
    with pytest.raises(RuntimeError, match="in the middle of TTA"):
        world.main(tmp_path, *options)
    assert "bbox/AP" in metrics(tmp_path)[-1]


def test_subclass_with_a_mapper_is_resumed_exactly(world: World, tmp_path) -> None:
    class OwnMapper(DistillTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, mapper=DatasetMapper(cfg, True))

    options = ("DATASETS.TEST", "()", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    world.main(whole, *options, "SOLVER.MAX_ITER", 2, trainer=OwnMapper)
    cut.mkdir()
    shutil.copy(whole / "model_0000000.pth", cut)
    world.main(cut, "--resume", *options, "SOLVER.MAX_ITER", 2, trainer=OwnMapper)
    assert_same(checkpoint(whole), checkpoint(cut))
    assert "build_train_loader" not in log(whole)


class Named(DistillTrainer):
    names: ClassVar[set[str]] = set()

    @classmethod
    def build_optimizer(cls, cfg, model):
        cls.names = {name for name, _ in model.named_parameters()}
        return super().build_optimizer(cfg, model)


class Compiled(Named):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        # The wrapper is what is tested; compiling takes a minute.
        model.student.backbone = torch.compile(model.student.backbone, disable=True)
        return torch.compile(model, disable=True)


def test_a_compiled_model_is_trained_and_resumed_as_it_is(world: World, tmp_path) -> None:
    """Its checkpoint is the plain one: the student's names, the method's optimizer, the teacher."""
    options = ("DATASETS.TEST", "()", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 1)
    options += ("MODEL.DISTILL.NAME", "ICDDistiller", "MODEL.DISTILL.IN_FEATURES", "['p5', 'p6']")
    options += ("MODEL.DISTILL.ICD.DIM", 16, "MODEL.DISTILL.ICD.HEADS", 2, "SOLVER.MAX_ITER", 2)
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    world.main(plain, *options, trainer=Named)
    world.main(compiled, *options, trainer=Compiled)
    # The rate of a layer may depend on its name.
    assert Named.names == {n.replace("backbone._orig_mod.", "backbone.") for n in Compiled.names}
    assert_same(checkpoint(plain), checkpoint(compiled))
    for name in ("model_final.pth", "model_0000001.pth"):
        (compiled / name).unlink(missing_ok=True)
    world.main(compiled, "--resume", *options, trainer=Compiled)
    assert_same(checkpoint(plain), checkpoint(compiled))
    assert len(checkpoint(compiled)["trainer"]["optimizer"]["optimizers"]) == 2


def test_resume_or_load_random_frozen_weights(world: World, tmp_path) -> None:
    options = ("MODEL.BACKBONE.FREEZE_AT", 1, "DATASETS.TEST", "()", "SOLVER.STEPS", "()")
    for number in (1, 2):
        world.main(tmp_path, "--resume", *options, "SOLVER.MAX_ITER", number)
    assert checkpoint(tmp_path)["iteration"] == 1
    assert log(tmp_path).count("MODEL.WEIGHTS is empty") == 1


def test_train_without_distillation_and_in_bfloat16(world: World, tmp_path) -> None:
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


def test_load_state_dict_another_learning_rate(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    world.main(folder, "--resume", "SOLVER.BASE_LR", 0.02)
    assert "SOLVER.BASE_LR: 0.02 (was: 0.01)" in log(folder)
    started_with = json.loads(checkpoint(folder)["trainer"]["config"])
    assert started_with["SOLVER.BASE_LR"] == 0.01, "it is logged again at the next resume"


def test_load_state_dict_other_levels(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    with pytest.raises(ValueError, match=r"--resume: .*model_0000002\.pth .*'trainer'"):
        world.main(folder, "--resume", "MODEL.DISTILL.IN_FEATURES", "['p3']")
    assert "MODEL.DISTILL.IN_FEATURES: ['p3'] (was: [])" in log(folder)


def test_load_state_dict_of_detectron2(world: World, tmp_path) -> None:
    plain = ("MODEL.DISTILL.ENABLED", "False", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    world.main(tmp_path, *plain)
    saved = checkpoint(tmp_path)
    saved["trainer"] = {"iteration": 0}
    torch.save(saved, tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match=r"--resume: .* MODEL\.WEIGHTS"):
        world.main(tmp_path, "--resume", *plain)


def test_resume_or_load_another_model(world: World, six: Path, tmp_path) -> None:
    folder = half_of(six, tmp_path / "resumed")
    with pytest.raises(ValueError, match=r"--resume: .*model_0000002\.pth"):
        world.main(folder, "--resume", "MODEL.ROI_BOX_HEAD.FC_DIM", 32)
    with pytest.raises(ValueError, match=r"--resume: .*distillers"):
        world.main(folder, "--resume", "MODEL.DISTILL.ENABLED", "False")


def test_resume_or_load_at_the_end(world: World, six: Path, tmp_path) -> None:
    """The run was killed between its last periodic checkpoint and the final one."""
    folder = tmp_path / "resumed"
    shutil.copytree(six, folder, ignore=shutil.ignore_patterns("model_final.pth"))
    (folder / "last_checkpoint").write_text("model_0000005.pth")
    world.main(folder, "--resume")
    assert "SOLVER.MAX_ITER is 6" in log(folder)
    assert_same(checkpoint(six), checkpoint(folder))


def test_resume_or_load_without_checkpoint(world: World, tmp_path) -> None:
    world.main(tmp_path, "--resume", "SOLVER.MAX_ITER", 1)
    assert f"No checkpoint in {tmp_path}" in log(tmp_path)


def test_build_hooks_order(world: World, tmp_path) -> None:

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
        PeriodicWriter,
    ]
    assert [kind for kind in kinds if kind in order] == order
    modules = list(trainer.model.modules())
    assert not any(module is trainer.model.load_teacher().backbone for module in modules)
    ids = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert ids == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {id(p) for p in trainer.model.distillers.parameters()} <= ids
    assert not ids & {id(p) for p in trainer.model.load_teacher().backbone.parameters()}


def test_load_state_dict_grad_scaler(world: World, tmp_path) -> None:
    """Float16 is for GPUs; its scaler's state travels as here."""

    cfg = world.cfg(tmp_path)
    register_datasets(cfg)
    first, second = DistillTrainer(cfg), DistillTrainer(cfg)
    for trainer, scale in ((first, 8.0), (second, 2.0)):
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    second.load_state_dict(first.state_dict())
    assert second.grad_scaler.get_scale() == 8.0
