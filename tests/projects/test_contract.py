"""What every method must hold, those of the paper's comparison included."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ssim_kd.modeling import DISTILLER_REGISTRY, build_distillers, resolved_config
from ssim_kd.modeling.distillers import bind_distillers
from tests.helpers import build, distilled_config, full_config, train_losses

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


#: By name: the weight of R-CNN, that of dense detectors, None for a kind that it does not serve.
WEIGHTS = {
    "SSIM": (4.0, 4.0),
    "L1": (4.0, 4.0),
    "L2": (4.0, 4.0),
    "PKD": (6.0, 10.0),
    "CWD": (10.0, 5.0),
    "MGD": (5e-7, 2e-5),
    **dict.fromkeys(("FGD", "FBKD", "DRKD", "ICD", "ReviewKD"), (1.0, 1.0)),
    **dict.fromkeys(("CrossKDRCNN", "DKD", "RCNNHead"), (1.0, None)),
    **dict.fromkeys(("CrossKD", "DenseHead"), (None, 1.0)),
}
NAMED = [
    (name, kind, weight)
    for name, weights in WEIGHTS.items()
    for kind, weight in zip(("faster", "retinanet"), weights, strict=True)
    if weight is not None
]


@pytest.mark.parametrize(("name", "kind", "weight"), NAMED)
def test_a_name_by_itself_trains(name, kind, weight, weights_of) -> None:
    """As NAME, as a term and in Python alike; the step is finite, and what is own is known."""
    name = f"{name}Distiller"
    named = distilled_config(kind, kind, weights_of(kind), "MODEL.DISTILL.NAME", name)
    terms = distilled_config(kind, kind, weights_of(kind), "MODEL.DISTILL.TERMS", [[name]])
    model, other = build(named), build(terms)
    (distiller,), (term,) = model.distillers.values(), other.distillers.values()
    assert distiller.weight(0.5) == weight and distiller.own == term.own
    python = DISTILLER_REGISTRY.get(name)()
    bind_distillers([python], model.student, model.teacher)
    assert python.own == distiller.own
    losses = train_losses(model)
    losses["loss_distill"].backward()
    # Maps of random detectors are large; SSIM's weight would give MGD 1e9.
    assert 0 < losses["loss_distill"] < 1e6
    # What is written into config.yaml means the same, and leaves nothing open.
    for cfg, built in ((named, model), (terms, other)):
        resolved = resolved_config(cfg, list(built.distillers.values()))
        (again,) = build(resolved).distillers.values()
        assert not again.own and again.weight(0.5) == weight
        assert again.part_weights == distiller.part_weights
        assert getattr(again, "levels", None) == getattr(distiller, "levels", None)


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
