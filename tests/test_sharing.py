"""What is passed on holds no keys of signed URLs."""

from __future__ import annotations

from typing import Any

import pytest
from detectron2.config import CfgNode
from omegaconf import OmegaConf

from ssim_kd.sharing import without_queries
from ssim_kd.trackers import TrackerWriter

SIGNED = "https://host.org/a/t.pth?sig=SECRET&x=1"
TEXTS = {
    SIGNED: "https://host.org/a/t.pth",
    "https://me:SECRET@host.org/t.pth": "https://host.org/t.pth",
    "https://SECRET@host.org:81/t.pth#SECRET": "https://host.org:81/t.pth",
    "S3://bucket/t.pth?X-Amz-Signature=SECRET": "S3://bucket/t.pth",
    f"WEIGHTS: '{SIGNED}'\nA: \"{SIGNED}\"": (
        "WEIGHTS: 'https://host.org/a/t.pth'\nA: \"https://host.org/a/t.pth\""
    ),
    "https://h/t.pth?matching_heuristics=True&sig=SECRET": (
        "https://h/t.pth?matching_heuristics=True"
    ),
    # Left as they are.
    "detectron2://COCO/t.pkl": "detectron2://COCO/t.pkl",
    "dir/t.pth?matching_heuristics=True": "dir/t.pth?matching_heuristics=True",
    "store://a b@c/t.pth": "store://a b@c/t.pth",
    "what? me@home": "what? me@home",
}


@pytest.mark.parametrize("text", TEXTS)
def test_without_queries_of_text(text: str) -> None:
    assert without_queries(text) == TEXTS[text]


def nested(url: str) -> dict[str, Any]:
    return {"A": {"B": [url, (url, 1)]}, "C": url, "D": None, "E": 0.5}


@pytest.mark.parametrize(
    "made", [dict, CfgNode, lambda x: OmegaConf.create({**x, "I": "${C}", "M": "???"})]
)
def test_without_queries_of_configs(made) -> None:
    config = made(nested(SIGNED))
    found = without_queries(config)
    assert type(found) is type(config) and found == made(nested("https://host.org/a/t.pth"))
    assert config == made(nested(SIGNED))


def test_without_queries_of_frozen_and_lazy() -> None:
    frozen = CfgNode(nested(SIGNED))
    frozen.freeze()
    assert without_queries(frozen).is_frozen()
    lazy = OmegaConf.create({"C": SIGNED, "I": "${C}"})
    assert OmegaConf.to_yaml(without_queries(lazy)).count("${C}") == 1


def test_parameters_of_a_tracker(tmp_path) -> None:
    class Writer(TrackerWriter):
        name = "json"  # a package that is installed

    writer = Writer(folder=str(tmp_path), params=CfgNode(nested(SIGNED)))
    assert "SECRET" not in str(writer.params) and "t.pth" in str(writer.params)
