"""What the evaluations of a training and its schedule need, checked before the first step."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from ssim_kd.data import Needs, register_datasets
from ssim_kd.engine import DistillTrainer, argument_parser, main, preflight
from ssim_kd.engine.preflight import check_evaluation, check_scored, settings_of
from ssim_kd.engine.trainer import YamlRecipe
from ssim_kd.projects import add_project_configs
from tests.engine.runs import World


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"LR_SCHEDULER_NAME": "CosineLR"}, "SOLVER.LR_SCHEDULER_NAME 'CosineLR'"),
        ({"STEPS": (4, 2)}, r"SOLVER.STEPS \(4, 2\)"),
        ({"STEPS": (2, 2)}, r"SOLVER.STEPS \(2, 2\)"),
        ({"WARMUP_METHOD": "quadratic"}, "SOLVER.WARMUP_METHOD 'quadratic'"),
    ],
)
def test_check_refuses_a_schedule(keys, named, world: World, tmp_path: Path) -> None:
    options = [x for key, value in keys.items() for x in (f"SOLVER.{key}", value)]
    with pytest.raises(ValueError, match=named):
        check(world, tmp_path, DistillTrainer, *options)


def check(world: World, folder: Path, trainer: Any, *options: Any) -> None:
    args = argument_parser().parse_args(world.arguments(folder, *options))
    YamlRecipe(args, add_project_configs, trainer).check()


def test_check_accepts_a_schedule_that_the_trainer_builds(world: World, tmp_path: Path) -> None:
    class Own(DistillTrainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return None

    check(world, tmp_path, Own, "SOLVER.LR_SCHEDULER_NAME", "Own")
    for name in ("WarmupCosineLR", "WarmupMultiStepLR"):
        check(world, tmp_path, DistillTrainer, "SOLVER.LR_SCHEDULER_NAME", name)


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(self: Any) -> None:
        raise AssertionError("the training began")

    monkeypatch.setattr(DistillTrainer, "train", train)


def test_main_tta_of_a_retinanet(world: World, tmp_path: Path, monkeypatch) -> None:
    no_training(monkeypatch)
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED is True.*RetinaNet"):
        world.main(tmp_path, "TEST.AUG.ENABLED", "True", config=world.retinanet)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("SOLVER.REFERENCE_WORLD_SIZE", 8, r"SOLVER\.REFERENCE_WORLD_SIZE"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full", r"SOLVER .*'full'"),
        ("INPUT.RANDOM_FLIP", "both", r"INPUT"),
    ],
)
def test_main_values_that_detectron2_does_not_name(
    key, value, named, world: World, tmp_path: Path, monkeypatch
) -> None:
    no_training(monkeypatch)
    with pytest.raises(ValueError, match=named):
        world.main(tmp_path, "SOLVER.CLIP_GRADIENTS.ENABLED", "True", key, value)


class OwnClasses(RetinaNet):
    """An architecture of the user's, which reads a custom key."""

    @classmethod
    def from_config(cls, cfg):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.OWN_CLASSES
        return super().from_config(cfg)


def test_main_classes_of_a_custom_architecture(world: World, tmp_path: Path, monkeypatch) -> None:
    no_training(monkeypatch)
    if "OwnClasses" not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(OwnClasses)

    def add_config(cfg: CfgNode) -> None:
        cfg.MODEL.OWN_CLASSES = 7

    options = ("MODEL.DISTILL.STUDENT_META_ARCHITECTURE", "OwnClasses", "DATASETS.TEST", "()")
    arguments = world.arguments(tmp_path, *options, config=world.retinanet)
    args = argument_parser().parse_args(arguments)
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN has 10 .*OwnClasses.* 7: .*'7', '8'"):
        main(args, add_config)
    args.opts += ["MODEL.OWN_CLASSES", "10"]
    with pytest.raises(AssertionError, match="the training began"):
        main(args, add_config)


def records(folder: Path, number: int = 3) -> list[dict[str, Any]]:
    names = [str(folder / f"{i}.png") for i in range(number)]
    return [{"file_name": n, "image_id": i, "height": 8, "width": 8} for i, n in enumerate(names)]


@pytest.fixture
def registered(tmp_path: Path):
    """A set whose second image is missing."""
    name = "preflight_set"
    for i in (0, 2):
        (tmp_path / f"{i}.png").touch()
    DatasetCatalog.register(name, lambda: records(tmp_path))
    yield name
    DatasetCatalog.pop(name)
    MetadataCatalog.pop(name, None)


TRAINER = SimpleNamespace(build_evaluator=lambda cfg, name: None)


def test_check_evaluation_missing_file(registered, world: World, tmp_path: Path) -> None:
    cfg = world.cfg(tmp_path, "DATASETS.TEST", f"('{registered}',)")
    with pytest.raises(FileNotFoundError, match=rf"{registered}.*1 of 3 .*1\.png"):
        check_evaluation(cfg, TRAINER, own_loader=True)
    # A loader of the user's may read anything else.
    check_evaluation(cfg, TRAINER, own_loader=False)


def test_check_evaluation_unknown_kind(registered, world: World, tmp_path: Path) -> None:
    MetadataCatalog.get(registered).evaluator_type = "my_metric"
    cfg = world.cfg(tmp_path, "DATASETS.TEST", f"('{registered}',)")
    with pytest.raises(ValueError, match=rf"DATASETS\.TEST.*{registered}.*my_metric"):
        check_evaluation(cfg, DistillTrainer, own_loader=False)
    check_evaluation(cfg, TRAINER, own_loader=False)


def test_check_evaluation_without_evaluator(registered, world: World, tmp_path: Path) -> None:
    """Detectron2 goes on without one as well."""

    def build_evaluator(cfg: Any, name: str) -> None:
        raise NotImplementedError

    cfg = world.cfg(tmp_path, "DATASETS.TEST", f"('{registered}',)")
    check_evaluation(cfg, SimpleNamespace(build_evaluator=build_evaluator), own_loader=False)


@pytest.mark.parametrize("kind", preflight._PACKAGES)
def test_check_evaluation_missing_package(
    kind, registered, world: World, tmp_path: Path, monkeypatch
) -> None:
    MetadataCatalog.get(registered).evaluator_type = kind
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = world.cfg(tmp_path, "DATASETS.TEST", f"('{registered}',)")
    with pytest.raises(ValueError, match=rf"{registered}.*'{preflight._PACKAGES[kind]}'"):
        check_evaluation(cfg, TRAINER, own_loader=False)


@pytest.mark.parametrize(
    ("task", "options", "accepted"),
    [
        ("bbox", (), True),
        ("segm", (), False),
        ("segm", ("MODEL.MASK_ON", "True"), True),
        ("bbox_TTA", (), False),
        ("bbox_TTA", ("TEST.AUG.ENABLED", "True"), True),
    ],
)
def test_check_evaluation_expected_results(
    task, options, accepted, world: World, tmp_path: Path
) -> None:
    expected = f"[['{task}', 'AP', 30.0, 1.0]]"
    cfg = world.cfg(tmp_path, *options, "TEST.EXPECTED_RESULTS", expected)
    register_datasets(cfg)
    if accepted:
        check_evaluation(cfg, TRAINER, own_loader=False)
    else:
        with pytest.raises(ValueError, match=rf"TEST\.EXPECTED_RESULTS is .*{task}"):
            check_evaluation(cfg, TRAINER, own_loader=False)


@pytest.mark.parametrize("scored", [True, False])
def test_check_scored(scored, world: World, tmp_path: Path) -> None:
    findings: Any = SimpleNamespace(scored=scored)
    summaries: list[Any] = [SimpleNamespace(name="digits_val", findings=findings)]
    cfg = world.cfg(tmp_path)
    needs = Needs.from_config(cfg)
    check_scored(settings_of(cfg), needs, summaries)
    expects = settings_of(world.cfg(tmp_path, "MODEL.DISTILL.TEACHER.EXPECTED_AP", 20))
    check_scored(expects, needs, [])
    if scored:
        check_scored(expects, needs, summaries)
    else:
        with pytest.raises(ValueError, match=r"TEACHER\.EXPECTED_AP is 20\.0.*digits_val"):
            check_scored(expects, needs, summaries)
