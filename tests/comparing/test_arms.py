"""The arms of the studies that are shipped: each builds, with the teacher of its stage."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from ssim_kd.comparing.study import Run, read_study
from ssim_kd.engine import load_config
from ssim_kd.modeling import DistilledDetector
from ssim_kd.projects import add_project_configs

ROOT = Path(__file__).resolve().parents[2]
STUDIES = {file.stem: read_study(file) for file in sorted((ROOT / "studies").glob("*.yaml"))}


def arms() -> Iterator[tuple[str, Run]]:
    """Each arm of each study once; a script registers what its own arm needs."""
    for name, study in STUDIES.items():
        weights = dict.fromkeys(study.content["arms"], 1.0)
        stages = [study.stage(stage, weights) for stage in study.content["stages"]]
        runs = [run for arms in stages for by_slot in arms.values() for run in by_slot.values()]
        yield from (
            (name, run) for run in {run.arm: run for run in runs if not run.script}.values()
        )


@pytest.mark.parametrize(("name", "run"), list(arms()), ids=lambda x: getattr(x, "arm", x))
def test_an_arm_builds(name: str, run: Run) -> None:
    # What is not in git, data and ImageNet's weights, is not needed to build.
    absent = {"DATASETS.DATA_FILE": "", "MODEL.TIMM.PRETRAINED": ""}
    opts = {**run.opts, **absent, "MODEL.DEVICE": "meta"}
    if run.teacher:
        opts["MODEL.DISTILL.TEACHER.NAME"] = str(STUDIES[name].models[run.teacher].config)
        opts["MODEL.DISTILL.TEACHER.WEIGHTS"] = "unread.pth"
    words = [str(word) for pair in opts.items() for word in pair]
    cfg = load_config(
        argparse.Namespace(config_file=str(run.config), opts=words), add_project_configs
    )
    with torch.device("meta"):
        model = build_model(cfg)
    assert bool(model.distillers) == bool(run.teacher)
    assert isinstance(model, DistilledDetector) and model.max_iter == cfg.SOLVER.MAX_ITER
    assert all(distiller.weight(0.0) >= 0 for distiller in model.distillers.values())
