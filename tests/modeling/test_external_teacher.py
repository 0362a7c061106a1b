"""Teachers that are not Detectron2 models."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.file_io import PathManager
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from ssim_kd.engine.evaluation import teacher_for_evaluation
from ssim_kd.modeling import FrozenTeacher
from ssim_kd.modeling.external_teacher import (
    ModuleTeacher,
    load_rtdetr,
    rtdetr_teacher,
    rtdetr_weights,
)
from ssim_kd.modeling.teacher_config import source_of
from tests.helpers import build, distilled_config, train_losses

LEVELS = {"res3": ShapeSpec(channels=128, stride=8), "res4": ShapeSpec(channels=256, stride=16)}
PIXELS = {"pixel_mean": [123.7, 116.3, 103.5], "pixel_std": [58.4, 57.1, 57.4]}


@pytest.fixture(scope="module")
def body() -> nn.Module:
    torch.manual_seed(0)
    return create_feature_extractor(resnet18(), {"layer2": "res3", "layer3": "res4"}).eval()


@pytest.fixture(scope="module")
def rtdetr():
    """A small RT-DETR with random weights."""
    transformers = pytest.importorskip("transformers", reason="the extra detr is not installed")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=32,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_layers=1,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        num_queries=5,
        num_denoising=0,
    )
    torch.manual_seed(0)
    model = transformers.RTDetrForObjectDetection(config).eval()
    # Its own start makes the maps nearly 0.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


def maps_of(model: nn.Module, pictures: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    return FrozenTeacher(model, input_format="RGB", **options).load()(pictures)


def test_module_teacher_is_given_normalised_images_in_its_channel_order(body) -> None:
    (picture,) = images((64, 96))
    found = maps_of(ModuleTeacher(body, LEVELS, **PIXELS), [picture])
    mean, std = (torch.tensor(PIXELS[key]).view(3, 1, 1) for key in ("pixel_mean", "pixel_std"))
    # The student's images are BGR.
    expected = body(((picture.flip(0) - mean) / std)[None])
    for level, value in expected.items():
        torch.testing.assert_close(found[level], value)


def test_module_teacher_pads_to_its_greatest_stride_or_what_is_asked_for(body) -> None:
    assert ModuleTeacher(body, LEVELS, **PIXELS).backbone.size_divisibility == 16
    teacher = ModuleTeacher(body, LEVELS, **PIXELS, size_divisibility=64)
    found = maps_of(teacher, images((60, 70), (40, 90)))
    assert found["res3"].shape == (2, 128, 8, 16) and found["res4"].shape == (2, 256, 4, 8)


def test_module_teacher_takes_maps_in_the_order_of_their_levels(body) -> None:
    class InOrder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return list(self.body(x).values())

    pictures = images((64, 64))
    ours = maps_of(ModuleTeacher(InOrder(), LEVELS, **PIXELS), pictures)
    theirs = maps_of(ModuleTeacher(body, LEVELS, **PIXELS), pictures)
    assert all(torch.equal(ours[level], theirs[level]) for level in LEVELS)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"res3": ShapeSpec(channels=64, stride=8)}, "res3"),
        ({"res4": ShapeSpec(channels=256, stride=8)}, "res4"),
        ({"res5": ShapeSpec(channels=512, stride=32)}, "res5"),
    ],
)
def test_module_teacher_that_is_described_wrongly_is_an_error(body, shapes, named) -> None:
    with pytest.raises(ValueError, match=named):
        ModuleTeacher(body, shapes, **PIXELS)


def test_rtdetr_maps_are_those_behind_its_hybrid_encoder(rtdetr, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.RTDetrImageProcessor(size={"height": 64, "width": 96})
    (picture,) = images((64, 96))
    inputs = processor(
        images=picture.flip(0), return_tensors="pt", input_data_format="channels_first"
    )
    expected = rtdetr(**inputs).encoder_last_hidden_state
    rtdetr.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = maps_of(load_rtdetr(str(tmp_path)), [picture])
    assert list(found) == ["p3", "p4", "p5"]
    for value, reference, stride in zip(found.values(), expected, (8, 16, 32), strict=True):
        assert value.shape == (1, 32, 64 // stride, 96 // stride)
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-4)


def test_rtdetr_keeps_the_size_of_the_students_images(rtdetr) -> None:
    teacher = rtdetr_teacher(rtdetr)
    assert teacher.backbone.size_divisibility == 32 and teacher.input_format == "RGB"
    found = maps_of(teacher, images((70, 90), (40, 130)))
    assert [tuple(m.shape[-2:]) for m in found.values()] == [(12, 20), (6, 10), (3, 5)]


def test_rtdetr_computes_positions_for_any_size(rtdetr) -> None:
    (layer,) = rtdetr.model.encoder.aifi
    layer.eval_size = (640, 640)
    teacher = rtdetr_teacher(rtdetr)
    found = maps_of(teacher, images((64, 96)))["p5"]
    assert layer.eval_size is None
    layer.eval_size = (640, 640)  # with it, the model has no positions at all
    without = maps_of(teacher, images((64, 96)))["p5"]
    layer.eval_size = None
    assert (found - without).norm() > 0.01 * found.norm()


def test_rtdetr_without_its_decoder_is_the_smaller(rtdetr) -> None:
    names = {name.split(".")[2] for name, _ in rtdetr_teacher(rtdetr).named_parameters()}
    assert names == {"backbone", "encoder", "encoder_input_proj"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rtdetr_runs_in_half_precision(rtdetr, dtype) -> None:
    found = maps_of(rtdetr_teacher(copy.deepcopy(rtdetr)), images((64, 96)), dtype=dtype)
    expected = maps_of(rtdetr_teacher(copy.deepcopy(rtdetr)), images((64, 96)))
    for level, value in found.items():
        assert value.dtype == dtype
        error = (value.float() - expected[level]).norm() / expected[level].norm()
        assert error < 0.05


@pytest.mark.parametrize(
    ("change", "mean", "std"),
    [
        ({}, 0.0, 255.0),
        ({"do_normalize": True}, 0.485 * 255, 0.229 * 255),
        ({"do_rescale": False}, 0.0, 1.0),
        (None, 0.0, 255.0),
    ],
)
def test_rtdetr_pixels_are_scaled_as_its_image_processor_does(
    rtdetr, tmp_path, change, mean, std
) -> None:
    transformers = pytest.importorskip("transformers")
    rtdetr.save_pretrained(tmp_path)
    if change is not None:
        transformers.RTDetrImageProcessor(**change).save_pretrained(tmp_path)
    teacher = load_rtdetr(str(tmp_path))
    assert float(teacher.pixel_mean[0]) == pytest.approx(mean, rel=1e-6)
    assert float(teacher.pixel_std[0]) == pytest.approx(std, rel=1e-6)


def test_rtdetr_weights_that_are_missing_are_an_error(rtdetr, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    rtdetr.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if "encoder_input_proj.0.0" in key)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        load_rtdetr(str(tmp_path))
    assert name in str(error.value)


def test_rtdetr_that_is_another_model_is_an_error(tmp_path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_rtdetr(str(tmp_path))
    with pytest.raises(ValueError, match="encoder_input_proj"):
        rtdetr_teacher(nn.Linear(1, 1))


def test_missing_transformers_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"ssim_kd\[detr\]"):
        load_rtdetr("hf://PekingU/rtdetr_r50vd")


def rtdetr_config(folder: Path) -> CfgNode:
    """A small Faster R-CNN with the RT-DETR of a folder as its teacher."""
    cfg = distilled_config("faster", "faster", "")
    cfg.MODEL.DISTILL.TEACHER.NAME = str(folder)
    cfg.MODEL.DISTILL.TEACHER.OPTS = []
    return cfg


def test_faster_rcnn_learns_from_rtdetr_by_its_folder(rtdetr, tmp_path) -> None:
    rtdetr.save_pretrained(tmp_path)
    model = build(rtdetr_config(tmp_path))
    assert model.loaded_teacher is None
    losses = train_losses(model)
    (distiller,) = model.distillers.values()
    assert distiller.levels == ["p3", "p4", "p5"] and model.teacher.input_format == "RGB"
    assert losses["loss_distill"] > 0 and torch.isfinite(losses["loss_distill"])
    losses["loss_distill"].backward()
    assert any(p.grad is not None for p in model.student.backbone.parameters())
    weights = tmp_path / "model.safetensors"
    assert model.loaded_teacher.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    expected = rtdetr.model.encoder.state_dict()
    found = model.loaded_teacher.backbone.module.encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("key", "value"), [("WEIGHTS", "teacher.pth"), ("OPTS", ["MODEL.RESNETS.DEPTH", 50])]
)
def test_rtdetr_with_keys_of_detectron2_is_an_error(rtdetr, tmp_path, key, value) -> None:
    rtdetr.save_pretrained(tmp_path)
    cfg = rtdetr_config(tmp_path)
    cfg.MODEL.DISTILL.TEACHER[key] = value
    with pytest.raises(ValueError, match=rf"TEACHER\.{key}" if key == "WEIGHTS" else key):
        build(cfg)


def test_rtdetr_without_weights_is_an_error(rtdetr, tmp_path) -> None:
    rtdetr.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        build(rtdetr_config(tmp_path))


def test_rtdetr_is_not_evaluated_by_detectron2(rtdetr, tmp_path) -> None:
    rtdetr.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="EXPECTED_AP"):
        teacher_for_evaluation(rtdetr_config(tmp_path))


def test_folder_of_a_run_is_no_rtdetr(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("VERSION: 2")
    with pytest.raises(ValueError, match=r"model_final\.pth"):
        source_of(str(tmp_path))


def test_files_of_the_hub_are_read_by_their_path(monkeypatch, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, file, **_: asked.append((repository, file)) or str(tmp_path / file),
    )
    path = rtdetr_weights("hf://PekingU/rtdetr_r50vd")
    with PathManager.open(path) as file:
        assert file.read() == "weights"
    assert asked == [("PekingU/rtdetr_r50vd", "model.safetensors")]
