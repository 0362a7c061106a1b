"""What every method must hold, those of the paper's comparison included."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ssim_kd.modeling import DISTILLER_REGISTRY, build_distillers
from tests.helpers import full_config

#: Arguments out of their range: method, argument, value, key.
OPTIONS: list[tuple[str, str, Any, str]] = [
    *(
        ("SSIM", *rest)
        for rest in (
            ("weight", -1.0, "LOSS_WEIGHT"),
            ("weight", "much", "LOSS_WEIGHT"),
            ("scaling", "image", "SCALING"),
            ("ssim_options.window_size", 10, "SSIM.WINDOW_SIZE"),
            ("ssim_options.sigma", 0.0, "SSIM.SIGMA"),
            ("resize", "area", "RESIZE"),
            ("level_weights", [1.0, -2.0], "LEVEL_WEIGHTS"),
            ("level_weights", [1.0, math.nan], "LEVEL_WEIGHTS"),
            ("level_weights", [1.0, "a"], "LEVEL_WEIGHTS"),
        )
    ),
    *(("L2", "scaling", bad, "SCALING") for bad in ("image",)),
    *(("PKD", "eps", bad, "PKD.EPS") for bad in (0.0, -1.0, math.nan)),
    *(("CWD", "temperature", bad, "CWD.TEMPERATURE") for bad in (0, -1.0, math.inf, "warm")),
    *(("MGD", "mask_ratio", bad, "MGD.MASK_RATIO") for bad in (1.0, -0.1, math.nan)),
    ("MGD", "reference", [2, 800], "MGD.REFERENCE"),
    ("FGD", "part_weights.fg", -1.0, "FGD.FG_WEIGHT"),
    ("FGD", "part_weights.global", math.nan, "FGD.GLOBAL_WEIGHT"),
    ("FGD", "temperature", 0.0, "FGD.TEMPERATURE"),
    ("FGD", "reference", [2, 800], "FGD.REFERENCE"),
    ("FBKD", "part_weights.feature", -1.0, "FBKD.FEATURE_WEIGHT"),
    ("FBKD", "part_weights.nonlocal", math.nan, "FBKD.NONLOCAL_WEIGHT"),
    ("FBKD", "temperature", 0.0, "FBKD.TEMPERATURE"),
    ("FBKD", "reference", [2, 800], "FBKD.REFERENCE"),
    ("FBKD", "pool_strides", [0], "FBKD.POOL_STRIDES"),
    ("FBKD", "inner_channels", [1.5], "FBKD.INNER_CHANNELS"),
    ("DRKD", "part_weights.pixel", -1.0, "DRKD.PIXEL_WEIGHT"),
    ("DRKD", "part_weights.instance", math.nan, "DRKD.INSTANCE_WEIGHT"),
    ("DRKD", "nodes", [0], "DRKD.NODES"),
    ("DRKD", "nodes", [2.5], "DRKD.NODES"),
    ("DRKD", "box_levels", -1, "DRKD.BOX_LEVELS"),
    ("DRKD", "reference", [2, 800], "DRKD.REFERENCE"),
    ("ICD", "part_weights.value", -1.0, "ICD.VALUE_WEIGHT"),
    ("ICD", "part_weights.sides", math.nan, "ICD.SIDES_WEIGHT"),
    ("ICD", "dim", 10, "ICD.DIM"),
    ("ICD", "heads", 0, "ICD.HEADS"),
    ("ICD", "hidden_dim", 2.5, "ICD.HIDDEN_DIM"),
    ("ICD", "fake_ratio", -1, "ICD.FAKE_RATIO"),
    ("ICD", "max_boxes", 0, "ICD.MAX_BOXES"),
    ("ICD", "fake_size", [0.2], "ICD.FAKE_SIZE"),
    ("ICD", "jitter", 0.6, "ICD.JITTER"),
    ("ICD", "detach_iters", -1, "ICD.DETACH_ITERS"),
    ("ICD", "clip_norm", 0, "ICD.CLIP_NORM"),
    ("ICD", "level_weights", [1.0, 2.0], "LEVEL_WEIGHTS"),
    ("ReviewKD", "channels", 0, "REVIEWKD.CHANNELS"),
    ("ReviewKD", "channels", 2.5, "REVIEWKD.CHANNELS"),
    ("DKD", "alpha", -1.0, "DKD.ALPHA"),
    ("DKD", "beta", math.nan, "DKD.BETA"),
    ("DKD", "temperature", 0.0, "DKD.TEMPERATURE"),
    *(("CrossKD", "depth", bad, "CROSSKD.DEPTH") for bad in (-1, 1.5, True)),
    *((name, "part_weights.cls", -1.0, "HEAD.CLS_WEIGHT") for name in ("CrossKD", "RCNNHead")),
    *((name, "temperature", 0.0, "HEAD.TEMPERATURE") for name in ("CrossKDRCNN", "RCNNHead")),
    ("DenseHead", "part_weights.box", math.nan, "HEAD.BOX_WEIGHT"),
]


@pytest.mark.parametrize(("name", "argument", "value", "key"), OPTIONS)
def test_an_option_out_of_range(name, argument, value, key) -> None:
    """Python names the argument, a config its key; both the value."""
    shown = repr(value[-1] if isinstance(value, list) and "weights" in argument else value)
    holder, _, entry = argument.partition(".")
    with pytest.raises(ValueError) as caught:
        DISTILLER_REGISTRY.get(f"{name}Distiller")(**{holder: {entry: value} if entry else value})
    words = str(caught.value)
    assert words.startswith((f"{argument} ", f"{entry or argument} ")) and "MODEL." not in words
    cfg = full_config()
    node = cfg.MODEL.DISTILL
    node.NAME = f"{name}Distiller"
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    assert last in node
    node[last] = value
    with pytest.raises(ValueError, match=rf"^MODEL\.DISTILL\.{key} ") as caught:
        build_distillers(cfg)
    assert any(text in str(caught.value) for text in (shown, repr(value), repr(value)[1:-1]))
