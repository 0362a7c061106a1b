"""One training, put as a YAML config, a LazyConfig and Python objects."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.env import seed_all_rng

from ssim_kd.config import student_config
from ssim_kd.data import build_train_loader, register_datasets
from ssim_kd.engine import DistillTrainer, argument_parser, distill, lazy, main, preflight
from ssim_kd.projects import add_project_configs
from tests.engine import inside
from tests.engine.runs import Child, World, children

WAYS = ("YAML", "LazyConfig", "Python")
SEED = 1

# The zoo's parts, with the values of tests/engine/runs.py.
LAZY = """
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper, build_detection_test_loader, build_detection_train_loader,
    get_detection_dataset_dicts, transforms as T,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from ssim_kd import DistilledDetector, FrozenTeacher, SSIMDistiller
from tests.engine.ways import build_student, register

register("{config}")
model = L(DistilledDetector)(
    student=L(build_student)(config="{config}", num_classes=10),
    teacher=L(FrozenTeacher.load_from)(name="{teacher}", weights="{weights}"),
    distillers=[L(SSIMDistiller)()],
    max_iter="${{..train.max_iter}}",
)
optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.01, momentum=0.9, weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1, 0.1], milestones=[4], num_updates=6
    ),
    warmup_factor=0.001, warmup_method="linear", warmup_length=2 / 6,
)
resize = L(T.ResizeShortestEdge)(short_edge_length=96, max_size=1333)
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_train"),
        mapper=L(DatasetMapper)(
            is_train=True, augmentations=[resize, L(T.RandomFlip)()], image_format="BGR"
        ),
        total_batch_size=4, num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_val", filter_empty=False),
        mapper=L(DatasetMapper)(is_train=False, augmentations=[resize], image_format="BGR"),
        num_workers=0,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="digits_val"),
)
train = dict(
    output_dir="", init_checkpoint="", max_iter=6, amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False), checkpointer=dict(period=3, max_to_keep=2),
    eval_period=0, log_period=20, device="cpu", seed={seed}, report=False,
)
"""


def cfg_of(config: str) -> CfgNode:
    from ssim_kd.engine import load_config

    return load_config(argument_parser().parse_args(["--config-file", config]), add_project_configs)


def register(config: str) -> None:
    register_datasets(cfg_of(config))


def build_student(config: str, num_classes: int) -> torch.nn.Module:
    return build_model(student_config(cfg_of(config)))


def options(way: str, settings: dict[str, Any]) -> list[Any]:
    """The settings as overrides of a config."""
    if way == "YAML":
        precise = settings.pop("precise_bn", 0)
        given = [x for k, v in settings.items() for x in (preflight.KEYS[k], v)]
        return [
            *given,
            "TEST.PRECISE_BN.ENABLED",
            bool(precise),
            "TEST.PRECISE_BN.NUM_ITER",
            precise,
        ]
    return [f"{lazy.KEYS[k]}={v}" for k, v in settings.items()]


def command_line(
    way: str, world: World, folder: Path, *flags: str, config: Path | None = None, **settings: Any
) -> list[str]:
    """Arguments of train_net.py."""
    config = config or world.config
    if way == "YAML":
        given = [*options(way, settings), "DATASETS.TEST", "('digits_val',)"]
        return world.arguments(folder, *flags, *given, config=config)
    path = world.folder / f"{config.stem}_lazy.py"
    teacher = {"teacher": world.teacher_config, "weights": world.teacher}
    path.write_text(LAZY.format(config=config, seed=SEED, **teacher))
    overrides = options(way, {"output_dir": folder, **settings})
    return ["--config-file", str(path), *flags, *overrides]


def modules_in_a_process(
    modules: tuple[str, str, str], settings: dict[str, Any], rank: int
) -> None:
    """Instead of a run: :func:`by_modules`, under DDP if there are ranks."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    by_modules(*modules, **settings)
    sys.exit(0)


def by_modules(config: str, teacher: str, folder: str, **settings: Any) -> Any:
    """The training of the config by Python objects."""
    resume = settings.pop("resume", False)
    register(config)
    cfg = cfg_of(config)
    seed_all_rng(SEED)
    student = build_model(student_config(cfg))
    settings = {"max_iter": 6, "checkpoint_period": 3, "report": False, **settings}
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = max(6, settings["max_iter"])  # after its STEPS
    loader = settings.pop("loader", None) or build_train_loader(cfg)
    optimizer = DistillTrainer.build_optimizer(cfg, student)

    def evaluate(model: torch.nn.Module) -> Any:
        return DistillTrainer.test(cfg, model)

    return distill(
        student,
        teacher,
        loader=loader,
        optimizer=optimizer,
        scheduler=lambda optimizer: build_lr_scheduler(cfg, optimizer),
        evaluate=evaluate,
        output_dir=folder,
        resume=resume,
        **settings,
    )


def teacher_run(world: World) -> str:
    """The teacher as the folder of a run."""
    folder = world.folder / "teacher_run"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.yaml").write_text(world.teacher_config.read_text())
        (folder / "model_final.pth").write_bytes(world.teacher.read_bytes())
    return str(folder)


@contextlib.contextmanager
def processes(
    way: str,
    world: World,
    folder: Path,
    *flags: str,
    ranks: int = 1,
    prepare: Any = None,
    config: Path | None = None,
    **settings: Any,
) -> Iterator[list[Child]]:
    """Train in real processes; ``prepare`` is called in each before."""
    steps = [prepare] if prepare else []
    line = ["--eval-only"]
    if way == "Python":
        modules = (str(config or world.config), teacher_run(world), str(folder))
        settings["resume"] = "--resume" in flags
        steps.append(partial(modules_in_a_process, modules, settings))
    else:
        line = command_line(way, world, folder, *flags, config=config, **settings)
    together = partial(inside.all_of, steps)
    with children(*[line] * ranks, folder=folder, prepare=together) as found:
        yield found


def train(
    way: str, world: World, folder: Path, *flags: str, config: Path | None = None, **settings: Any
) -> Any:
    """Train in this process."""
    teacher = settings.pop("teacher", None)
    if way == "Python":
        modules = (str(config or world.config), teacher or teacher_run(world), str(folder))
        return by_modules(*modules, resume="--resume" in flags, **settings)
    if teacher:
        flags = (*flags, f"--teacher={teacher}")
    line = command_line(way, world, folder, *flags, config=config, **settings)
    return main(argument_parser().parse_args(line), add_project_configs)
