"""What every method must hold that compares features, on the models of its configs."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from torch import nn

from ssim_kd.engine import load_config
from ssim_kd.engine.optimizer import build_optimizer
from ssim_kd.modeling import DistilledDetector, FrozenTeacher, build_distillers
from ssim_kd.projects import add_project_configs
from tests.helpers import (
    TEACHER_FPN,
    bfloat16_without_onednn,
    build,
    make_batch,
    stock_config,
    train_losses,
)
from tests.level_maps import batch_of, bind

ROOT = Path(__file__).resolve().parents[2] / "projects"
METHODS = ("PKD", "CWD", "MGD", "FGD", "FBKD", "DRKD")
CONFIGS = [file for name in METHODS for file in sorted((ROOT / name).glob("configs/*_demo.yaml"))]
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}

COCO = [file for name in METHODS for file in sorted((ROOT / name).glob("configs/*_1x.yaml"))]

each_config = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


def load(file: Path) -> CfgNode:
    args = argparse.Namespace(config_file=str(file), opts=["MODEL.DEVICE", "cpu"])
    return load_config(args, add_project_configs)


def bound(file: Path) -> nn.Module:
    """The distiller of a config, for a student of 6 channels and a teacher of 8."""
    cfg = load(file)
    assert cfg.MODEL.DISTILL.ENABLED, f"{file}: MODEL.DISTILL.ENABLED is False"
    (distiller,) = build_distillers(cfg)
    return bind(distiller, 6, 8, {level: STRIDES[level] for level in distiller.levels})


def maps(distiller: nn.Module, size: tuple[int, int], n: int) -> list[dict[str, torch.Tensor]]:
    """Maps of student and teacher for images of this size in pixels."""
    return [
        {
            level: torch.randn(n, channels, *(-(-x // STRIDES[level]) for x in size))
            for level in distiller.levels
        }
        for channels in (6, 8)
    ]


# An image with a box, one without area and one of a single pixel; one without any.
BOXES = [[[3.0, 4.0, 50.0, 40.0], [9.0, 9.0, 9.0, 30.0], [60.0, 60.0, 61.0, 61.0]], []]


def test_every_method_has_a_config_for_both_detectors() -> None:
    for name in METHODS:
        files = [file.name for file in CONFIGS if file.parts[-3] == name]
        assert [file for file in files if "retinanet" in file], (
            f"{name}: no *_retinanet_*_demo.yaml"
        )
        assert [file for file in files if "retinanet" not in file], f"{name}: no other *_demo.yaml"


@each_config
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "n"), [((128, 160), 2), ((64, 64), 1)], ids=["two-images", "one-image"]
)
def test_value_and_gradients_are_finite(file, autocast, size, n) -> None:
    """The second case has a single image, whose maps go down to a single cell."""
    distiller = bound(file)
    student, teacher = maps(distiller, size, n)
    for value in student.values():
        value.requires_grad_()
    batch = batch_of(BOXES[:n], size)
    if n > 1:
        batch.image_sizes[1] = (100, 90)  # the rest is padding
    with bfloat16_without_onednn(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, scalars = distiller(student, teacher, batch)
    total.backward()
    assert total.dtype == torch.float32 and torch.isfinite(total) and total > 0
    assert scalars and not any(value.requires_grad for value in scalars.values())
    weighted = sum(value * distiller.scalar_weights[key] for key, value in scalars.items())
    torch.testing.assert_close(weighted, total.detach())
    # A map of one cell may give none: a softmax or a variance over it is constant.
    largest = distiller.levels[0]
    assert student[largest].grad.any()
    assert all(torch.isfinite(value.grad).all() for value in student.values())
    for name, p in distiller.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("file", [*CONFIGS, *COCO], ids=lambda file: file.stem)
def test_images_without_any_box(file) -> None:
    distiller = bound(file)
    student, teacher = maps(distiller, (64, 64), 2)
    for value in student.values():
        value.requires_grad_()
    total, _ = distiller(student, teacher, batch_of([[], []]))
    total.backward()
    assert torch.isfinite(total) and total > 0
    assert all(torch.isfinite(value.grad).all() for value in student.values())


def model_of(file: Path) -> DistilledDetector:
    """A small student, and a teacher of another width with other classes."""
    cfg = load(file)
    kind = "retinanet" if "retinanet" in file.stem else "faster"
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES", 3)
    teacher = FrozenTeacher(build(stock_config(kind, *classes, fpn=TEACHER_FPN), seed=1))
    student = build(stock_config(kind))
    return DistilledDetector(
        student=student, teacher=teacher, distillers=build_distillers(cfg), max_iter=10
    )


@each_config
def test_a_step_trains_student_and_own_modules_alone(file) -> None:
    model = model_of(file)
    batch = make_batch(((64, 96), (64, 64)))
    batch[1]["instances"] = batch[1]["instances"][:0]
    assert isinstance(batch[1]["instances"].gt_boxes, Boxes)
    optimizer = build_optimizer(load(file), model)
    losses = train_losses(model, batch)
    losses["loss_distill"].backward()

    own = {f"distillers.{n}": p for n, p in model.distillers.named_parameters()}
    for name, p in model.named_parameters():
        if not name.startswith(("backbone.", "distillers.")):
            assert p.grad is None, name  # the student's heads
        elif name in own:
            assert p.grad is not None, name
    (distiller,) = model.distillers.values()
    top = model.student.backbone.fpn_output3.weight
    assert top.grad is not None and top.grad.any()
    assert all(p.grad is None for p in model.teacher.model.backbone.parameters())

    # In the optimizer, and thereby in DDP; in the training's checkpoint; not in the student.
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in own.values()} <= trained
    assert set(own) <= set(model.state_dict())
    assert not set(own) & set(model.student.state_dict())
    before = {name: p.detach().clone() for name, p in own.items()}
    sum(train_losses(model, batch).values()).backward()
    optimizer.step()
    moved = [name for name, p in own.items() if not torch.equal(p, before[name])]
    assert bool(moved) == bool(own)

    # A resumed training has them as they were.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for p in own.values():
        torch.nn.init.zeros_(p)
    model.load_state_dict(state)
    assert all(torch.equal(p, state[name]) for name, p in own.items())
    assert distiller.name == file.stem.split("_")[0]
