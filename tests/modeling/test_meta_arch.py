"""The student: a stock detector, in its checkpoints and in its losses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch.utils.checkpoint import checkpoint

from ssim_kd.config import student_config
from ssim_kd.modeling import DistilledDetector
from tests.helpers import (
    build,
    distilled_config,
    gradients,
    make_batch,
    stock_config,
    train_losses,
)

STUDENTS = ("faster", "mask", "cascade", "retinanet")


@pytest.fixture(scope="module")
def cfg(weights_of):
    return distilled_config("faster", "faster", weights_of("faster"))


def save_checkpoint(model, folder: Path) -> Path:
    """A checkpoint with everything that a training keeps."""
    checkpointer = DetectionCheckpointer(model.student, str(folder), distillers=model.distillers)
    checkpointer.save("model_final")
    return folder / "model_final.pth"


def fields(output) -> dict[str, torch.Tensor]:
    found = dict(output["instances"].get_fields())
    found["pred_boxes"] = found["pred_boxes"].tensor
    return found


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_checkpoint_is_the_stock_detectors(kind, weights_of, tmp_path, caplog) -> None:
    """It holds tensors and plain values only: no code of ours is needed to read it."""
    cfg = distilled_config(kind, "faster", weights_of("faster"))
    model = build(cfg)
    path = save_checkpoint(model, tmp_path)

    stock = build_model(stock_config(kind)).eval()
    result = stock.load_state_dict(torch.load(path, weights_only=True)["model"], strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    student = build_model(student_config(cfg))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(student).load(str(path))
    assert not caplog.records

    cfg.MODEL.WEIGHTS = str(path)
    predict = DefaultPredictor(student_config(cfg))
    stock_predict = DefaultPredictor(stock_config(kind, "MODEL.WEIGHTS", str(path)))
    image = make_batch(((96, 128),))[0]["image"]
    with torch.no_grad():
        expected = fields(model.eval()([{"image": image, "height": 96, "width": 128}])[0])
    assert len(expected["scores"]) > 0
    for predictor in (predict, stock_predict):
        # 96 x 128 is the size that the predictors resize to.
        found = fields(predictor(image.permute(1, 2, 0).numpy()))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("kind", STUDENTS)
def test_without_distillation_the_losses_are_the_stock_ones(kind) -> None:
    off = ("MODEL.DISTILL.ENABLED", False)
    model = build(distilled_config(kind, "faster", "no/such/weights.pth", *off))
    assert model.teacher is None and not model.distillers and model.metrics == {}
    stock = build(stock_config(kind))
    found, expected = train_losses(model), train_losses(stock)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_with_weight_0_the_gradients_are_the_baselines_bit_for_bit(kind, weights_of) -> None:
    cfg = distilled_config(kind, "mask", weights_of("mask"), "MODEL.DISTILL.LOSS_WEIGHT", 0.0)
    model = build(cfg)
    state = torch.get_rng_state()
    stock = build(stock_config(kind))
    assert torch.equal(state, torch.get_rng_state())

    found = train_losses(model)
    state = torch.get_rng_state()
    expected = train_losses(stock)
    assert torch.equal(state, torch.get_rng_state())
    assert found["loss_distill"] == 0
    assert found.keys() - expected.keys() == {"loss_distill"}
    assert all(torch.equal(found[k], expected[k]) for k in expected)

    sum(found.values()).backward()
    sum(expected.values()).backward()
    ours, theirs = gradients(model.student), gradients(stock)
    assert theirs and ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name


def test_names_are_those_of_the_plain_student(cfg) -> None:
    # ViTDet's learning rates go by names that start with "backbone".
    model, stock = build(cfg), build(stock_config("faster"))
    plain = [name for name, _ in stock.named_parameters()]
    found = [name for name, _ in model.named_parameters()]
    assert found[: len(plain)] == plain
    assert found[len(plain) :] and all(n.startswith("distillers.") for n in found[len(plain) :])
    assert {name for name, _ in stock.named_modules()} < {name for name, _ in model.named_modules()}
    modules = dict(model.named_modules())
    assert modules[""] is model and modules["student"] is model.student
    wrapped = [name for name, _ in torch.nn.ModuleDict({"module": model}).named_parameters()]
    assert wrapped == [f"module.{name}" for name in found]


def test_a_compiled_part_has_plain_names_in_checkpoints() -> None:
    student, stock = build(stock_config("faster")), build(stock_config("faster"), seed=1)
    student.backbone = torch.compile(student.backbone, disable=True)
    student.roi_heads.box_head = torch.compile(student.roi_heads.box_head, disable=True)
    model = DistilledDetector(student=student)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict())
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in model.state_dict().items())
    found = model.load_state_dict({"backbone.x": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["backbone.x"]
    assert "backbone.fpn_output2.weight" in found.missing_keys
    assert set(found.missing_keys) < stock.state_dict().keys()


def test_a_model_can_be_pickled_whole(cfg, tmp_path) -> None:
    model = build(cfg)
    model.load_teacher()
    torch.save(model, tmp_path / "whole.pth")
    twin = torch.load(tmp_path / "whole.pth", weights_only=False)
    assert type(twin) is type(model) and isinstance(twin, type(model.student))
    found, expected = train_losses(twin), train_losses(model)
    assert found.keys() == expected.keys() and "loss_distill" in found
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_the_inputs_are_left_as_they_were(cfg) -> None:
    batch, untouched = make_batch(), make_batch()
    train_losses(build(cfg), batch)
    for one, other in zip(batch, untouched, strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)


def test_loss_distill_may_not_hide_a_loss_of_the_students(cfg, monkeypatch) -> None:
    model = build(cfg)
    monkeypatch.setattr(
        type(model.student), "forward", lambda *_: {"loss_distill": torch.zeros(())}
    )
    with pytest.raises(ValueError, match="loss_distill"):
        train_losses(model)


def checkpointed(backbone, levels: tuple[str, ...], *, reentrant: bool) -> None:
    """Recompute what a backbone does in the backward pass."""
    inner = backbone.forward

    def forward(images):
        images = images.requires_grad_() if reentrant else images
        maps = checkpoint(lambda x: tuple(inner(x).values()), images, use_reentrant=reentrant)
        return dict(zip(levels, maps, strict=True))

    backbone.forward = forward


@pytest.mark.parametrize("level", ["res3", "p3"])
def test_features_hidden_by_checkpointing_are_an_error(level, weights_of) -> None:
    levels = ("MODEL.DISTILL.IN_FEATURES", [level])
    cfg = distilled_config("faster", "faster", weights_of("faster"), *levels)
    found = []
    for reentrant in (True,) if level == "res3" else (None, False, True):
        model = build(cfg)
        backbone = model.student.backbone
        if reentrant is not None:
            checkpointed(backbone, tuple(backbone.output_shape()), reentrant=reentrant)
        if reentrant and level == "res3":
            with pytest.raises(ValueError, match=r"\['res3'\].*ssim.*use_reentrant"):
                train_losses(model)
            with torch.no_grad():  # as precise batch norms do
                train_losses(model)
            return
        train_losses(model)["loss_distill"].backward()
        found.append(gradients(model.student)["backbone.bottom_up.res3.0.conv1.weight"])
    assert all(torch.equal(found[0], gradient) for gradient in found)
