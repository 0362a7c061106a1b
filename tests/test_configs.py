"""Every config that is shipped can be read and built; and compares what it says it compares."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ssim_kd.engine import load_config
from ssim_kd.modeling import teacher_source
from ssim_kd.projects import add_project_configs

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")])


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
    # The teacher is on the meta device too: its weights are loaded at the first use.
    assert not model.teacher.loaded
    distillers = list(model.distillers.values())
    assert all(distiller.weight(0.0) > 0 for distiller in distillers)
    if len(distillers) == 1 and hasattr(distillers[0], "levels"):
        levels = distillers[0].levels
        assert levels == list(cfg.MODEL.DISTILL.IN_FEATURES or levels)
        assert len(levels) >= 4 or cfg.MODEL.DISTILL.IN_FEATURES
    weights = teacher_source(cfg).weights
    assert weights.startswith("https://dl.fbaipublicfiles.com/detectron2/") or weights.endswith(
        ".pth"
    )
    # Several terms at once: ssim+crosskd_retinanet_R_50_FPN_1x.yaml.
    assert file.stem.split("_")[0] == "+".join(model.distillers)


def plain_of(file: Path) -> Path | None:
    """The plain student of a distilled config, by its name."""
    student = file.stem.split("_", 1)[1].split("_from_")[0]
    found = [f for f in CONFIGS if f.name == f"plain_{student}.yaml"]
    return found[0] if found else None


@pytest.mark.parametrize("file", [f for f in CONFIGS if is_distilled(f)], ids=name)
def test_a_distilled_config_differs_from_its_plain_student_by_the_distillation(file: Path) -> None:
    other = plain_of(file)
    assert other is not None, f"{file.name} has no plain student to be compared with"
    distilled, plain = load(file), load(other)
    assert distilled.MODEL.DISTILL.ENABLED and not plain.MODEL.DISTILL.ENABLED
    for cfg in (distilled, plain):
        cfg.defrost()
        cfg.MODEL.DISTILL = CfgNode()
        cfg.OUTPUT_DIR = ""
    assert distilled == plain
