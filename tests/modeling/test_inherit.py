"""INIT_FROM_TEACHER: what is copied, when, and what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils.events import EventStorage

from tests.helpers import TEACHER_FPN, build, distilled_config, make_batch

D = "MODEL.DISTILL."
SAME_WIDTH = ("MODEL.FPN.OUT_CHANNELS", TEACHER_FPN)


def step(model, iteration: int) -> None:
    model.train()
    with EventStorage(iteration):
        model(make_batch())


def inherits(name: str, parts: list[str]) -> bool:
    if name.startswith("backbone."):
        return "fpn" in parts and not name.startswith("backbone.bottom_up.")
    return "heads" in parts


@pytest.mark.parametrize("parts", [["fpn"], ["heads"], ["fpn", "heads"]])
def test_copy_inherited_parts_at_the_first_step(parts, weights_of, caplog) -> None:
    caplog.set_level(logging.INFO)
    opts = (*SAME_WIDTH, D + "INIT_FROM_TEACHER", parts)
    model = build(distilled_config("faster", "faster", weights_of("faster"), *opts))
    before = {k: v.clone() for k, v in model.student.state_dict().items()}
    teacher = torch.load(weights_of("faster"))["model"]
    step(model, 0)
    for name, value in model.student.state_dict().items():
        if inherits(name, parts):
            assert torch.equal(value, teacher[name]), name
            assert name in caplog.text
        elif "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name
    assert model.loaded_teacher.kept == {}


def test_copy_inherited_not_on_resume(weights_of) -> None:
    opts = (*SAME_WIDTH, D + "INIT_FROM_TEACHER", ["fpn"])
    model = build(distilled_config("faster", "faster", weights_of("faster"), *opts))
    before = model.student.backbone.fpn_output2.weight.detach().clone()
    step(model, 5)
    assert torch.equal(model.student.backbone.fpn_output2.weight, before)


@pytest.mark.parametrize(
    "take",
    [
        lambda model: model.state_dict(),
        lambda model: dict(model.named_parameters()),
        lambda model: copy.deepcopy(model).state_dict(),
    ],
)
def test_an_average_of_the_weights_begins_with_what_was_copied(take, weights_of) -> None:
    """By a hook of any trainer, such as Detectron2's SimpleTrainer."""
    opts = (*SAME_WIDTH, D + "INIT_FROM_TEACHER", ["heads"])
    model = build(distilled_config("faster", "faster", weights_of("faster"), *opts))
    name = "roi_heads.box_predictor.cls_score.weight"
    saved = torch.load(weights_of("faster"))["model"][name]
    assert not torch.equal(take(model)[name], saved)  # start weights are still to be loaded
    seen = []

    class Average(HookBase):
        def before_train(self) -> None:
            seen.append(take(self.trainer.model)[name].detach().clone())

    trainer = SimpleTrainer(model, [make_batch()], torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([Average()])
    trainer.train(0, 1)
    assert torch.equal(seen[0], saved)


@pytest.mark.parametrize(
    ("student", "teacher", "opts", "parts", "named"),
    [
        ("faster", "faster", (), ["fpn"], "backbone.fpn_"),  # 32 and 48 channels
        ("faster", "faster", ("MODEL.ROI_HEADS.NUM_CLASSES", 3), ["heads"], "cls_score"),
        ("faster", "cascade", (), ["heads"], "roi_heads.box_head.fc1"),
        ("faster", "faster", (), ["backbone"], "['fpn', 'heads']"),
        ("c4", "c4", (), ["fpn"], "'fpn'"),
    ],
)
def test_check_inherited_of_another_shape(student, teacher, opts, parts, named, weights_of) -> None:
    width = () if parts == ["fpn"] else SAME_WIDTH
    cfg = distilled_config(student, teacher, weights_of(teacher), *width, *opts)
    cfg.MODEL.DISTILL.INIT_FROM_TEACHER = parts
    with pytest.raises(ValueError, match="INIT_FROM_TEACHER") as caught:
        build(cfg)
    assert named in str(caught.value)
