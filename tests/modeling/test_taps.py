"""Taps: by level, and gone after each step."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from detectron2.modeling import build_model

from ssim_kd.modeling import Tap, tappable_levels
from tests.helpers import build, distilled_config, make_batch, stock_config, train_losses


@pytest.fixture(scope="module")
def detector():
    return build_model(stock_config("faster")).eval()


@pytest.fixture(scope="module")
def model(weights_of):
    cfg = distilled_config(
        "faster", "faster", weights_of("faster"), "MODEL.DISTILL.IN_FEATURES", ["res3", "p3"]
    )
    model = build(cfg)
    model.load_teacher()
    return model


def hooks(model: torch.nn.Module) -> list:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("faster", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        ("retinanet", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
        ("c4", {"res4": 16}),
        ("dc5", {"res5": 16}),
    ],
)
def test_levels_come_with_their_strides(kind, expected) -> None:
    model = build_model(stock_config(kind))
    levels = tappable_levels(model)
    below = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    if kind in ("faster", "retinanet"):
        expected = expected | {k: v for k, v in below.items() if kind == "faster" or k != "res2"}
    assert {name: shape.stride for name, shape in levels.items()} == expected
    with Tap(model, list(levels)) as features, torch.no_grad():
        model.backbone(torch.zeros(1, 3, 128, 128))
    found = {name: (value.shape[1], 128 // value.shape[2]) for name, value in features.items()}
    assert found == {name: (shape.channels, shape.stride) for name, shape in levels.items()}


def test_a_tap_gives_the_very_tensors_of_the_forward(detector) -> None:
    images = torch.rand(1, 3, 64, 64)
    with Tap(detector, ["p3", "res5"]) as features, torch.no_grad():
        outputs = detector.backbone(images)
    assert features["p3"] is outputs["p3"]
    with torch.no_grad():
        below = detector.backbone.bottom_up(images)
    assert set(features) == {"p3", "res5"} and torch.equal(features["res5"], below["res5"])


def test_tap_of_an_unknown_name_names_it_and_the_levels(detector) -> None:
    with pytest.raises(ValueError, match=r"\['p7', 'res9', ''\].*'p2'.*'res5'"):
        Tap(detector, ["p3", "p7", "res9", ""])


def test_tap_of_a_submodule_collects_its_calls(detector) -> None:
    names = ["p3", "proposal_generator.rpn_head.conv", "roi_heads.box_pooler"]
    with Tap(detector, names) as outputs, torch.no_grad():
        detector(make_batch())
    calls = outputs["proposal_generator.rpn_head.conv"]
    # The head is called once a level, p2 to p6, in their order.
    sizes = [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
    assert [tuple(call.output.shape[-2:]) for call in calls] == sizes
    assert calls[1].inputs[0] is outputs["p3"]
    (pooled,) = outputs["roi_heads.box_pooler"]
    boxes = pooled.inputs[1]
    assert len(boxes) == 2 and pooled.output.shape[0] == sum(len(b) for b in boxes)
    assert not hooks(detector)


def test_no_hook_is_left_after_a_step_or_an_exception(model, monkeypatch) -> None:
    batch = make_batch()
    del batch[0]["instances"]
    with pytest.raises((AssertionError, KeyError)):
        train_losses(model, batch)
    assert not hooks(model) and not hooks(model.load_teacher().backbone)

    def fail(*_args, **_kwargs):
        raise ArithmeticError("in the teacher")

    with monkeypatch.context() as patch:
        patch.setattr(model.load_teacher().backbone.bottom_up, "forward", fail)
        with pytest.raises(ArithmeticError):
            train_losses(model)
    assert "loss_distill" in train_losses(model)
    assert not hooks(model) and not hooks(model.load_teacher().backbone)


def test_no_activation_outlives_the_step(model) -> None:
    seen: list[weakref.ref] = []

    def remember(_module, _inputs, output):
        seen.extend(weakref.ref(value) for value in output.values())

    handles = [
        module.register_forward_hook(remember)
        for module in (model.student.backbone, model.load_teacher().backbone)
    ]
    losses = train_losses(model)
    for handle in handles:
        handle.remove()
    sum(losses.values()).backward()
    del losses
    gc.collect()
    assert len(seen) == 10 and not [ref for ref in seen if ref() is not None]
    assert all(not value.requires_grad for value in model.metrics.values())


def test_evaluation_neither_taps_nor_asks_the_teacher(model, monkeypatch) -> None:
    def fail(*_args, **_kwargs):
        raise AssertionError("asked in evaluation")

    monkeypatch.setattr(type(model.teacher), "__call__", fail)
    monkeypatch.setattr(Tap, "__enter__", fail)
    model.eval()
    batch = make_batch()
    with torch.no_grad():
        found = model(batch)
        expected = model.student(batch)
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["instances"].scores, other["instances"].scores)
