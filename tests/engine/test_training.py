"""What every training does, whatever it was put as: the three ways are one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssim_kd import FrozenTeacher, distill
from ssim_kd.engine.settings import Settings
from ssim_kd.engine.train_loop import DistillStep, NonFiniteError
from tests.engine.runs import World, assert_same, checkpoint, log, metrics, save_random_detector
from tests.engine.ways import WAYS, by_modules, teacher_run, train
from tests.helpers import build, full_config, make_batch, stock_config


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six steps each way."""
    folders = {way: tmp_path_factory.mktemp(way) for way in WAYS}
    for way, folder in folders.items():
        train(way, world, folder)
    return folders


def half_of(folder: Path, to: Path) -> Path:
    """What a run that was killed after three steps leaves."""
    left = shutil.ignore_patterns("model_final.pth", "*5.pth", "*.lock")
    shutil.copytree(folder, to, ignore=left)
    (to / "last_checkpoint").write_text("model_0000002.pth")
    return to


@pytest.mark.parametrize("way", WAYS[1:])
def test_training_is_the_same_in_every_way(way: str, whole: dict[str, Path]) -> None:
    yaml, other = checkpoint(whole["YAML"]), checkpoint(whole[way])
    for part in ("model", "distillers"):
        assert_same(yaml[part], other[part], part)
    for part in ("data", "teacher_sha256"):
        assert_same(yaml["trainer"][part], other["trainer"][part], part)
    run = json.loads((whole[way] / "run.json").read_text())
    assert run["config"] == way and run["teacher"]["sha256"]


@pytest.mark.parametrize("way", WAYS[:2])
def test_a_seed_that_was_drawn_makes_the_run_again(way: str, world: World, tmp_path) -> None:
    train(way, world, tmp_path / "drawn", max_iter=1, seed=-1)
    seed = json.loads((tmp_path / "drawn" / "run.json").read_text())["seed"]
    assert f"generated random seed {seed}" in log(tmp_path / "drawn")
    train(way, world, tmp_path / "given", max_iter=1, seed=seed)
    assert_same(*(checkpoint(tmp_path / name)["model"] for name in ("drawn", "given")))


def test_resumed_from_a_checkpoint_of_the_former_lazy_trainer(world: World, whole, tmp_path):
    """It has neither the teacher nor the config, seed and states of the processes."""
    folder = half_of(whole["LazyConfig"], tmp_path / "resumed")
    saved = torch.load(folder / "model_0000002.pth")
    had = saved["trainer"]
    saved["trainer"] = {name: had[name] for name in ("iteration", "optimizer", "grad_scaler")}
    saved["trainer"]["hooks"] = {"LRScheduler": had["hooks"]["LRScheduler"]}
    torch.save(saved, folder / "model_0000002.pth")
    train("LazyConfig", world, folder, "--resume")
    assert_same(checkpoint(whole["LazyConfig"])["model"], checkpoint(folder)["model"])
    assert "does not name its teacher, config and seed" in log(folder)


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_resumed_equals_the_whole(self, way, world: World, whole, tmp_path) -> None:
        folder = half_of(whole[way], tmp_path / "resumed")
        train(way, world, folder, "--resume")
        assert_same(checkpoint(whole[way]), checkpoint(folder))

    def test_resumed_loss_normalizer(self, way, world: World, tmp_path) -> None:
        folders = [tmp_path / name for name in ("whole", "resumed")]
        short = {"max_iter": 2, "checkpoint_period": 1, "config": world.retinanet}
        train(way, world, folders[0], **short)
        folders[1].mkdir()
        shutil.copy(folders[0] / "model_0000000.pth", folders[1])
        train(way, world, folders[1], "--resume", **short)
        whole, resumed = (checkpoint(folder) for folder in folders)
        assert whole["trainer"]["hooks"]["RankStates"]["loss_normalizer"] != [100.0]
        assert_same(whole, resumed)

    def test_another_teacher_at_resume(self, way, world: World, whole, tmp_path) -> None:
        other = tmp_path / "teacher"
        other.mkdir()
        shutil.copy(world.teacher_config, other / "config.yaml")
        save_random_detector(world.teacher_config, other / "model_final.pth", seed=6)
        folder = half_of(whole[way], tmp_path / "resumed")
        with pytest.raises(ValueError, match=r"--resume: .*teacher of SHA-256"):
            train(way, world, folder, "--resume", teacher=str(other))

    def test_settings(self, way, world: World, tmp_path) -> None:
        # What is kept by default, in each language.
        assert (
            Settings("output", 1).checkpoints_to_keep
            == full_config().SOLVER.CHECKPOINTS_TO_KEEP
            == 2
        )
        settings = {"eval_period": 2, "checkpoint_period": 1, "checkpoints_to_keep": 1}
        settings |= {"accumulate": 2, "vis_period": 2, "precise_bn": 2, "log_period": 1}
        if way == "YAML":
            del settings["log_period"]
        train(way, world, tmp_path, max_iter=5, **settings)
        # The last evaluation is of the last step, 4.
        evaluated = {min(4, x["iteration"]) for x in metrics(tmp_path) if "bbox/AP" in x}
        assert checkpoint(tmp_path, "model_best")["iteration"] in evaluated >= {1, 3}
        names = ("model_0000004.pth", "model_best.pth", "model_final.pth")
        assert {p.name for p in tmp_path.glob("model_*.pth")} == {*names}
        tags = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload().Tags()
        assert {"distill/p2", "distill/p6"} <= set(tags["images"])
        assert "Precise statistics of batch norms: 2" in log(tmp_path)

    def test_accumulate_must_divide_the_batch(self, way, world: World, tmp_path) -> None:
        with pytest.raises(ValueError, match="is 3, but a process has 4 images"):
            train(way, world, tmp_path, accumulate=3)

    def test_skipped_steps(self, way, world: World, tmp_path, monkeypatch) -> None:
        backward = DistillStep._backward

        def nan_once(self: DistillStep, *args: Any) -> None:
            if self.iter == 1:
                raise NonFiniteError("injected", fatal=False)
            backward(self, *args)

        monkeypatch.setattr(DistillStep, "_backward", nan_once)
        with pytest.raises(NonFiniteError):
            train(way, world, tmp_path / "none", max_iter=2)
        train(way, world, tmp_path / "one", max_iter=2, max_skipped_steps=1)
        assert checkpoint(tmp_path / "one")["trainer"]["skipped_steps"] == 1

    def test_start_that_fits_in_part(self, way, world: World, whole, tmp_path) -> None:
        start = {k: v for k, v in checkpoint(whole[way])["model"].items() if "res5" not in k}
        torch.save({"model": start}, tmp_path / "start.pth")
        settings = {"weights": tmp_path / "start.pth", "max_iter": 1}
        partial = {"YAML": "MODEL.WEIGHTS_PARTIAL", "LazyConfig": "train.weights_partial"}
        with pytest.raises(ValueError, match=partial.get(way, "weights_partial")):
            train(way, world, tmp_path / "strict", **settings)
        train(way, world, tmp_path / "partial", **settings, weights_partial=True)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("max_iter", 0), ("checkpoint_period", 0), ("grace_period", -1)),
            *(("max_skipped_steps", -1), ("accumulate", 0), ("expected_ap", 200)),
            *(("weights", "/nowhere.pth"), ("checkpoints_to_keep", -1)),
        ],
    )
    def test_values_before_the_first_step(
        self, way, name, value, world: World, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setattr(DistillStep, "run_step", None)
        with pytest.raises(ValueError, match=rf"\S+ is '?{value}"):
            train(way, world, tmp_path, **{name: value})

    def test_teacher_that_falls_short(self, way, world: World, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(DistillStep, "run_step", None)
        with pytest.raises(ValueError, match=r"is 30(\.0)?"):
            train(way, world, tmp_path, expected_ap=30.0)


def modules(world: World, folder: Path, **settings: Any) -> Any:
    return by_modules(str(world.config), teacher_run(world), str(folder), **settings)


@pytest.mark.parametrize("kind", ["list", "DataLoader"])
def test_distill_with_a_loader_that_ends(kind: str, world: World, tmp_path) -> None:
    """It begins again."""
    batch = make_batch(((64, 64),))
    loader: Any = [batch] * 2
    if kind == "DataLoader":
        loader = torch.utils.data.DataLoader(batch, collate_fn=list)  # type: ignore[arg-type]
    assert modules(world, tmp_path / "again", loader=loader, max_iter=3).iter == 3
    with pytest.raises(ValueError, match="has no batch at iteration 2"):
        modules(world, tmp_path / "once", loader=iter([batch] * 2), max_iter=3)


@pytest.mark.parametrize(
    ("student", "unused"),
    [
        ("config", {"max_iter": 4}),
        ("config", {"distillers": []}),
        ("config", {"loader": []}),
        ("config", {"accumulate": 2}),
        ("module", {"epochs": 50.0}),
        ("module", {"data": "data.yaml"}),
        ("module", {"opts": ["SOLVER.BASE_LR", 0.5]}),
        ("module", {"no_such_setting": 1}),
    ],
)
def test_distill_takes_no_argument_without_effect(student, unused, world: World, tmp_path) -> None:
    (name,) = unused
    with pytest.raises(TypeError, match=name):
        if student == "module":
            modules(world, tmp_path, **unused)
        else:
            distill(str(world.config), str(world.teacher_config), output_dir=tmp_path, **unused)


def test_distill_takes_paths(world: World, tmp_path) -> None:
    teacher = Path(teacher_run(world))
    opts = ["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()"]
    trained = distill(world.config, teacher, output_dir=tmp_path / "config", opts=opts)
    assert trained.iter == 1 and (tmp_path / "config" / "model_final.pth").is_file()
    by_modules(str(world.config), teacher, tmp_path / "modules", max_iter=1)  # type: ignore
    assert (tmp_path / "modules" / "model_final.pth").is_file()


def test_distill_keeps_the_optimizer_of_a_method(world: World, tmp_path) -> None:
    from ssim_kd.projects.icd import ICDDistiller

    method = ICDDistiller(dim=16, heads=2, levels=["p5", "p6"])
    trained = modules(world, tmp_path, distillers=[method], max_iter=1)
    ours, theirs = trained.optimizer.optimizers
    assert type(ours) is torch.optim.SGD and type(theirs) is torch.optim.AdamW
    own = {id(p) for group in method.param_groups(0.01) for p in group["params"]}
    assert {id(p) for group in theirs.param_groups for p in group["params"]} == own


def test_distill_with_a_detector_as_teacher(world: World, tmp_path) -> None:
    """Another one at a resume is refused, without a file that it came from."""

    def teacher(seed: int) -> FrozenTeacher:
        return FrozenTeacher(build(stock_config("faster", fpn=48), seed=seed))

    config = str(world.config)
    by_modules(config, teacher(1), str(tmp_path), max_iter=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--resume: .*teacher of SHA-256"):
        by_modules(config, teacher(2), str(tmp_path), max_iter=2, resume=True)  # type: ignore
    by_modules(config, teacher(1), str(tmp_path), max_iter=2, resume=True)  # type: ignore
