"""One training, put as a YAML config, a LazyConfig and Python objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.env import seed_all_rng

from ssim_kd.config import student_config
from ssim_kd.data import build_train_loader, register_datasets
from ssim_kd.engine import DistillTrainer, argument_parser, distill, lazy, main, preflight
from ssim_kd.engine.settings import Settings
from ssim_kd.projects import add_project_configs
from tests.engine.runs import World

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
        values=[1, 0.1], milestones=[4], num_updates="${{...train.max_iter}}"
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
        return [x for k, v in settings.items() for x in (preflight.KEYS[k], v)]
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


def by_modules(config: str, teacher: str, folder: str, rank: int = 0, **settings: Any) -> Any:
    """The training of the config by Python objects."""
    resume = settings.pop("resume", False)
    register(config)
    cfg = cfg_of(config)
    seed_all_rng(SEED)
    student = build_model(student_config(cfg))
    settings = {"max_iter": 6, "checkpoint_period": 3, "report": False, **settings}
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


def train(
    way: str, world: World, folder: Path, *flags: str, config: Path | None = None, **settings: Any
) -> Any:
    """Train in this process."""
    if way == "Python":
        unlike = settings.keys() - {f.name for f in Settings.__dataclass_fields__.values()}
        assert not unlike, unlike
        modules = (str(config or world.config), teacher_run(world), str(folder))
        return by_modules(*modules, resume="--resume" in flags, **settings)
    line = command_line(way, world, folder, *flags, config=config, **settings)
    return main(argument_parser().parse_args(line), add_project_configs)
