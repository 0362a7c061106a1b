"""Every config that is shipped can be read and built; and compares what it says it compares."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from torch import nn

from ssim_kd.engine import load_config
from ssim_kd.modeling import DistilledDetector, build_distillers, teacher_source
from ssim_kd.projects import add_project_configs
from tests.helpers import (
    build,
    build_fcos,
    make_batch,
    stock_config,
    train_losses,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "projects/*/configs")
CONFIGS = sorted(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.yaml"))
LAZY = sorted(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*fcos*.py"))


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def load(file: Path, *opts: object) -> CfgNode:
    """As train_net.py does."""
    args = argparse.Namespace(config_file=str(file), opts=["MODEL.DEVICE", "cpu", *opts])
    return load_config(args, add_project_configs)


def is_base(file: Path) -> bool:
    return file.stem.startswith("Base-")


def is_distilled(file: Path) -> bool:
    return not is_base(file) and not file.stem.startswith(("plain_", "teacher_"))


def test_configs_are_shipped() -> None:
    assert sum(is_distilled(file) for file in CONFIGS) >= 10
    assert {file.parent.name for file in CONFIGS} >= {"COCO-Detection", "configs"}


@pytest.mark.parametrize("file", [f for f in CONFIGS if not is_base(f)], ids=name)
def test_a_config_builds(file: Path) -> None:
    if "vitdet" in file.stem:
        pytest.importorskip("detectron2.modeling.backbone.vit", reason="ViT is in Detectron2 main")
    cfg = load(file, "MODEL.DEVICE", "meta", "MODEL.TIMM.PRETRAINED", "")
    assert cfg.DATASETS.TRAIN and cfg.DATASETS.TEST
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        assert max(cfg.SOLVER.STEPS) < cfg.SOLVER.MAX_ITER
    with torch.device("meta"):
        model = build_model(cfg)
    if not is_distilled(file):
        assert getattr(model, "teacher", None) is None
        return
    assert cfg.MODEL.DISTILL.ENABLED, f"{file}: MODEL.DISTILL.ENABLED is False, as in its _BASE_"
    # The teacher is on the meta device too: its weights are loaded at the first use.
    assert model.loaded_teacher is None
    distillers = list(model.distillers.values())
    assert all(distiller.weight(0.0) > 0 for distiller in distillers)
    if len(distillers) == 1 and hasattr(distillers[0], "levels"):
        levels = distillers[0].levels
        own = distillers[0].own_values(model.student)["levels"]
        assert levels == list(cfg.MODEL.DISTILL.IN_FEATURES or own or levels)
    weights = teacher_source(cfg).weights
    assert weights.startswith("https://dl.fbaipublicfiles.com/detectron2/") or weights.endswith(
        ".pth"
    )
    # Several terms at once: ssim+crosskd_retinanet_R_50_FPN_1x.yaml.
    assert file.stem.split("_")[0] == "+".join(model.distillers)


def plain_of(file: Path) -> Path | None:
    """The plain student of a distilled config, by its name."""
    student = file.stem.split("_", 1)[1].split("_from_")[0].removesuffix("_inherited")
    found = [f for f in CONFIGS if f.name == f"plain_{student}.yaml"]
    return found[0] if found else None


@pytest.mark.parametrize("file", [f for f in CONFIGS if is_distilled(f)], ids=name)
def test_a_distilled_config_differs_from_its_plain_student_by_the_distillation(file: Path) -> None:
    other = plain_of(file)
    assert other is not None, f"{file.name} has no plain student to be compared with"
    distilled, plain = load(file), load(other)
    assert distilled.MODEL.DISTILL.ENABLED, f"{file}: ENABLED is False, as in its _BASE_"
    assert not plain.MODEL.DISTILL.ENABLED
    for cfg in (distilled, plain):
        cfg.defrost()
        cfg.MODEL.DISTILL = CfgNode()
        cfg.OUTPUT_DIR = ""
    assert distilled == plain


@pytest.mark.parametrize("file", [f for f in LAZY if not is_base(f)], ids=name)
def test_a_lazy_config_builds(file: Path) -> None:
    config = LazyConfig.load(str(file))
    with torch.device("meta"):
        model = instantiate(config.model)
    assert type(getattr(model, "student", model)) is FCOS
    if not is_distilled(file):
        return
    assert "+".join(model.distillers) == file.stem.split("_")[0] and model.loaded_teacher is None
    assert model.max_iter == config.train.max_iter
    plain_name = "plain_" + file.name.split("_", 1)[1].replace("_inherited", "")
    (other,) = (f for f in LAZY if f.name == plain_name)
    plain = LazyConfig.load(str(other))
    for part in ("optimizer", "lr_multiplier", "dataloader", "train"):
        assert config[part] == plain[part]
    assert config.model.student == plain.model


# Steps. The detectors of the configs would take minutes.


@functools.cache
def detector(kind: str, fpn: int, seed: int) -> nn.Module:
    """A small detector whose towers are as deep as the zoo's."""
    if kind == "fcos":
        return build_fcos(fpn=fpn, seed=seed)
    return build(stock_config(kind, "MODEL.RETINANET.NUM_CONVS", 4, fpn=fpn), seed=seed)


def take_a_step(kind: str, distillers: Sequence[nn.Module], *, inherits: Sequence[str]) -> None:
    """One with an image that has no box, except for stock FCOS, which cannot take it."""
    student = detector(kind, 32, 0)
    # Of another width, unless parts of it are copied.
    teacher = detector(kind, 32 if inherits else 64, 1)
    model = DistilledDetector(
        student=student,
        teacher=teacher,
        distillers=distillers,
        init_from_teacher=inherits,
        max_iter=10,
    )
    batch = make_batch(((64, 96), (64, 64)))
    if kind != "fcos":
        batch[1]["instances"] = batch[1]["instances"][:0]
    student.zero_grad()
    losses = train_losses(model, batch)
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_distill"] > 0
    terms = model.distillers if len(distillers) > 1 else ()
    assert all(model.metrics[f"distill/{term}_weighted"] > 0 for term in terms)
    sum(losses.values()).backward()
    for name, p in [*student.named_parameters(), *model.distillers.named_parameters()]:
        assert p.grad is None or torch.isfinite(p.grad).all(), name
    assert all(p.grad is not None for p in model.distillers.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.fixture(scope="module")
def vit_opts(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Keys of VFM for a ViT of one layer with random weights."""
    timm = pytest.importorskip("timm")
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    torch.save(model.state_dict(), path)
    key = "MODEL.DISTILL.VFM"
    pairs = [x for pair in options.items() for x in pair]
    return [
        f"{key}.NAME",
        "vit_tiny_patch16_224",
        f"{key}.WEIGHTS",
        str(path),
        f"{key}.OPTS",
        pairs,
    ]


@pytest.mark.parametrize("file", [f for f in CONFIGS if is_distilled(f)], ids=name)
def test_the_distillers_of_a_config_take_a_step(file: Path, request) -> None:
    opts = request.getfixturevalue("vit_opts") if "vfm" in file.stem else ()
    cfg = load(file, *opts)
    distill = cfg.MODEL.DISTILL
    kind = "retinanet" if distill.STUDENT_META_ARCHITECTURE == "RetinaNet" else "faster"
    take_a_step(kind, build_distillers(cfg), inherits=distill.INIT_FROM_TEACHER)


@pytest.mark.parametrize("file", [f for f in LAZY if is_distilled(f)], ids=name)
def test_the_distillers_of_a_lazy_config_take_a_step(file: Path) -> None:
    model = LazyConfig.load(str(file)).model
    distillers = [instantiate(node) for node in model.distillers]
    take_a_step("fcos", distillers, inherits=list(model.get("init_from_teacher", ())))
