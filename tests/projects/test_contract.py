"""Every method is held by the contract; the names of older configs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssim_kd.modeling import DISTILLER_REGISTRY, build_distillers
from tests.helpers import full_config

ROOT = Path(__file__).parents[2]


def test_every_method_has_a_class_of_tests() -> None:
    full_config()  # registers the methods of all projects
    files = [*ROOT.glob("projects/*/tests/*.py"), *ROOT.glob("tests/modeling/distillers/*.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    held = set(re.findall(r"    method = (?:DISTILLER_REGISTRY.get\(\")?(\w+Distiller)\b", text))
    known = {name for name, _ in DISTILLER_REGISTRY if name.endswith("Distiller")}
    assert held == known - {"VFMDistiller"}  # which is made of a ViT


@pytest.mark.parametrize(
    ("name", "loss", "expected"),
    [
        ("", "", "SSIMDistiller"),
        ("", "l1", "L1Distiller"),
        ("FeatureDistiller", "l2", "L2Distiller"),
        ("LpDistiller", "l1", "L1Distiller"),
        ("LpDistiller", "", "L2Distiller"),
        ("PKDDistiller", "l2", "PKDDistiller"),
    ],
)
def test_names_of_older_configs(name, loss, expected) -> None:
    cfg = full_config()
    cfg.MODEL.DISTILL.NAME, cfg.MODEL.DISTILL.LOSS = name, loss
    (found,) = build_distillers(cfg)
    assert type(found).__name__ == expected
