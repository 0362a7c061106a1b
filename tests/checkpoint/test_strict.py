"""Strict loading: every key, shape and value that does not fit is refused."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from detectron2.modeling import build_model

from tests.checkpoint.weights import load, refused, zoo_format
from tests.helpers import save_weights, stock_config


def test_load_strictly_other_classes(model, tmp_path) -> None:
    file = save_weights(
        stock_config("faster", "MODEL.ROI_HEADS.NUM_CLASSES", 3), tmp_path / "3.pth"
    )
    left = load(model, file)
    assert left and all(k.startswith("roi_heads.box_predictor.") for k in left)
    assert torch.equal(
        model.state_dict()["backbone.fpn_output2.weight"],
        torch.load(file)["model"]["backbone.fpn_output2.weight"],
    )
    with pytest.raises(ValueError, match=r"cls_score\.weight \(4, 32\) for \(6, 32\)"):
        load(model, file, feature_path="")


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        (("MODEL.RESNETS.DEPTH", 101), r"\d+ keys unexpected .*res4\.6"),
        (("MODEL.RESNETS.WIDTH_PER_GROUP", 16), r"\d+ keys of another shape .* for \("),
        (("MODEL.FPN.OUT_CHANNELS", 16), r"fpn_lateral2\.weight \(16, 16, 1, 1\) for \(32, 16"),
    ],
    ids=["depth", "width", "FPN"],
)
def test_load_strictly_another_architecture(opts, match, model, tmp_path) -> None:
    file = save_weights(stock_config("faster", *opts), tmp_path / "other.pth")
    refused(model, file, match)


def test_load_strictly_another_detector(model, tmp_path) -> None:
    file = save_weights(stock_config("retinanet"), tmp_path / "retinanet.pth")
    message = refused(model, file, r"does not fit GeneralizedRCNN")
    assert "fpn_lateral2.weight" in message and "top_block.p6.weight" in message


def test_load_strictly_another_norm(tmp_path) -> None:
    names = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")
    width = [x for name in names for x in (f"MODEL.RESNETS.{name}", 32)]  # GN has 32 groups
    configs = [stock_config("c4", *width, "MODEL.RESNETS.NORM", norm) for norm in ("BN", "GN")]
    for config, other, match in (
        (configs[0], configs[1], r"\d+ keys missing .*running_mean"),
        (configs[1], configs[0], r"\d+ keys unexpected .*running_mean"),
    ):
        refused(build_model(config), save_weights(other, tmp_path / "other.pth"), match)


def test_load_strictly_imagenet_backbone(state, model, tmp_path) -> None:
    prefix = "backbone.bottom_up."
    bottom_up = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps({**zoo_format(bottom_up), "matching_heuristics": True}))
    refused(model, file, "the file of an ImageNet backbone; expected that of a trained detector")


def test_load_strictly_without_heads(state, model, tmp_path) -> None:
    file = tmp_path / "backbone.pth"
    torch.save({k: v for k, v in state.items() if k.startswith("backbone.")}, file)
    refused(model, file, "only a backbone")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_strictly_not_finite(value, state, model, tmp_path) -> None:
    key = "backbone.bottom_up.res3.1.conv2.weight"
    damaged = {k: v.clone() for k, v in state.items()}
    damaged[key].view(-1)[7] = value
    torch.save({"model": damaged}, tmp_path / "nan.pth")
    refused(model, tmp_path / "nan.pth", re.escape(f"{key} holds NaN or Inf"))


def test_load_strictly_zero_convolution(state, model, tmp_path) -> None:
    key = "backbone.fpn_output3.weight"
    torch.save({**state, key: torch.zeros_like(state[key])}, tmp_path / "zeros.pth")
    refused(model, tmp_path / "zeros.pth", re.escape(f"{key} is all zeros"))


def test_load_strictly_wrapped_student(state, model, tmp_path) -> None:
    torch.save({f"student.{k}": v for k, v in state.items()}, tmp_path / "wrapped.pth")
    message = refused(model, tmp_path / "wrapped.pth", r"\d+ keys missing", feature_path="")
    assert f"{len(state)} in the file" in message or "keys unexpected" in message
