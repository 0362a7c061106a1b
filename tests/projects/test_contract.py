"""What every method must hold, those of the paper's comparison included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ssim_kd.modeling import DISTILLER_REGISTRY, DistillBatch, build_distillers, resolved_config
from ssim_kd.modeling.distillers import bind_distillers
from tests.helpers import (
    bfloat16_without_onednn,
    build,
    distilled_config,
    full_config,
    train_losses,
)
from tests.level_maps import batch_of, bind

full_config()  # registers the methods of all projects

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
    own = dict(model.distillers.named_parameters())
    assert all(p.grad is not None for p in own.values())
    dense = name in ("CrossKDDistiller", "DenseHeadDistiller", "DKDDistiller", "RCNNHeadDistiller")
    heads = [n for n, p in model.student.named_parameters() if p.grad is not None]
    assert dense or all(n.startswith("backbone.") for n in heads)
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert not any("distillers" in n for n in model.student.state_dict())
    assert {f"distillers.{n}" for n in own} <= set(model.state_dict())
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


STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64}
#: The methods that compare maps, with options that make them small.
METHODS: dict[str, dict[str, Any]] = {
    "SSIM": {},
    "L1": {},
    "L2": {},
    "PKD": {},
    "CWD": {},
    "MGD": {},
    "FGD": {},
    "FBKD": {"inner_channels": [2, 2, 2, 2]},
    "DRKD": {"nodes": [2, 2, 2, 2]},
    "ICD": {"num_classes": 3, "dim": 8, "heads": 2, "hidden_dim": 8, "detach_iters": 0},
    "ReviewKD": {"channels": 8},
}
#: Of which equal maps of equal width cost nothing, without a module being trained for it.
AT_REST = ("SSIM", "L1", "L2", "PKD", "CWD", "FGD")
#: Whose loss of a batch is the mean of its halves', so that two processes are one.
MEANS = ("SSIM", "L1", "L2", "CWD", "FGD")
#: Of which a padded map is the cropped one. The others convolve, or mirror, beyond the image.
CROPPED = ("L1", "L2", "PKD", "CWD", "FGD", "DRKD", "ICD")
NEED_BOXES = ("FGD", "DRKD", "ICD")
# An image with a box, one without area and one of a single pixel; one without any.
BOXES = [[[3.0, 4.0, 50.0, 40.0], [9.0, 9.0, 9.0, 30.0], [60.0, 60.0, 61.0, 61.0]], []]

each_method = pytest.mark.parametrize("name", METHODS)


def make(name: str, student: int = 6, teacher: int = 8) -> nn.Module:
    """A bound distiller of two widths."""
    method = DISTILLER_REGISTRY.get(f"{name}Distiller")
    return bind(method(levels=list(STRIDES), **METHODS[name]), student, teacher, STRIDES)


def pyramid(channels: int, size: tuple[int, int], n: int = 2) -> dict[str, torch.Tensor]:
    """Maps for images of this size in pixels, with gradients."""
    sizes = {level: tuple(-(-x // stride) for x in size) for level, stride in STRIDES.items()}
    return {k: torch.randn(n, channels, *hw, requires_grad=True) for k, hw in sizes.items()}


def frozen(maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {level: value.detach().clone() for level, value in maps.items()}


class TestMethodsOfMaps:
    """As they are, on maps that are padded, tiny, few, half as precise, or without boxes."""

    @each_method
    @pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("size", "boxes"),
        [((128, 160), BOXES), ((64, 64), [[]]), ((64, 64), BOXES[:1]), ((64, 64), [[], []])],
        ids=["padded", "one-image-without-boxes", "one-image", "no-boxes"],
    )
    def test_gradients_are_finite_and_only_where_they_belong(self, name, half, size, boxes) -> None:
        """The smaller images have maps of 1 x 1 cells."""
        distiller, n = make(name), len(boxes)
        student, teacher = pyramid(6, size, n), frozen(pyramid(8, size, n))
        batch = batch_of(boxes, size)
        if size == (128, 160):
            batch.image_sizes[1] = (100, 90)
        with bfloat16_without_onednn(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            total, scalars = distiller(student, teacher, batch)
        total.backward()
        assert total.dtype == torch.float32 and torch.isfinite(total) and total > 0
        assert scalars and not any(value.requires_grad for value in scalars.values())
        weighted = sum(value * distiller.scalar_weights[key] for key, value in scalars.items())
        torch.testing.assert_close(weighted, total.detach())
        asks = name == "ICD" and not boxes[0]  # what it compares is in boxes
        assert student["p3"].grad.any() != asks
        assert all(torch.isfinite(value.grad).all() for value in student.values())
        for own, p in distiller.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all(), own

    @pytest.mark.parametrize("name", [name for name in METHODS if name not in ("MGD", "ReviewKD")])
    def test_half_precision_is_taken_to_single(self, name) -> None:
        distiller = make(name, 8)
        student, teacher = frozen(pyramid(8, (64, 96))), frozen(pyramid(8, (64, 96)))
        halves = [{k: v.bfloat16() for k, v in maps.items()} for maps in (student, teacher)]
        batch = batch_of(BOXES, (64, 96))
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = distiller(*halves, batch)
        expected, _ = distiller(*({k: v.float() for k, v in x.items()} for x in halves), batch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", AT_REST)
    def test_equal_maps_cost_nothing(self, name) -> None:
        distiller, student = make(name, 8), pyramid(8, (64, 96))
        total, _ = distiller(student, frozen(student), batch_of(BOXES, (64, 96)))
        total.backward()
        assert float(total.detach()) == pytest.approx(0, abs=1e-6)
        if name != "L1":  # which has no gradient at 0, but is the least there
            assert max(float(v.grad.abs().max()) for v in student.values()) < 1e-5

    @pytest.mark.parametrize("name", MEANS)
    def test_two_processes_are_one(self, name) -> None:
        distiller, size = make(name), (64, 96)
        student, teacher = pyramid(6, size), frozen(pyramid(8, size))
        whole = batch_of(BOXES, size)
        whole.image_sizes[1] = (40, 60)
        halves = []
        for i in (0, 1):
            batch = batch_of(BOXES[i : i + 1], size)
            batch.image_sizes = whole.image_sizes[i : i + 1]
            maps = ({k: v[i : i + 1] for k, v in side.items()} for side in (student, teacher))
            halves.append(distiller(*maps, batch)[0])
        torch.testing.assert_close(sum(halves) / 2, distiller(student, teacher, whole)[0])

    @pytest.mark.parametrize("name", CROPPED)
    def test_masked_is_cropped(self, name) -> None:
        distiller, boxes = make(name), [BOXES[0][:1]] * 2
        student, teacher = frozen(pyramid(6, (128, 192))), frozen(pyramid(8, (128, 192)))
        found, _ = distiller(student, teacher, batch_of(boxes, (64, 128)))
        cropped = (
            {k: v[..., : -(-64 // STRIDES[k]), : -(-128 // STRIDES[k])] for k, v in maps.items()}
            for maps in (student, teacher)
        )
        expected, _ = distiller(*cropped, batch_of(boxes, (64, 128)))
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("name", NEED_BOXES)
    def test_training_images_without_ground_truth(self, name) -> None:
        maps = (frozen(pyramid(width, (64, 64), 1)) for width in (6, 8))
        with pytest.raises(ValueError, match=f"{name}Distiller needs the ground truth") as caught:
            make(name)(*maps, DistillBatch([(64, 64)]))
        assert "'instances'" in str(caught.value)

    @each_method
    def test_a_resumed_training_has_its_modules(self, name) -> None:
        distiller, other = make(name), make(name)
        other.load_state_dict({k: v + 1 for k, v in distiller.state_dict().items()})
        other.load_state_dict(distiller.state_dict())
        ours, theirs = distiller.state_dict(), other.state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        # Nothing of a batch stays behind: a second step is that of the resumed one.
        size = (64, 96)
        for step in range(2):
            batch = batch_of(BOXES, size, iteration=step)
            torch.manual_seed(step)
            maps = frozen(pyramid(6, size)), frozen(pyramid(8, size))
            found = distiller(*maps, batch)[0]
        other.load_state_dict(distiller.state_dict())
        batch = batch_of(BOXES, size, iteration=1)
        other.eval(), distiller.eval()
        assert torch.equal(other(*maps, batch)[0], distiller(*maps, batch)[0]), found
