"""VFM: tokens of a tiny random ViT against loops, and what may go wrong around them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes

from ssim_kd.modeling import DistillBatch, DistilledDetector, FrozenTeacher, build_distillers
from ssim_kd.projects.vfm import VFMDistiller
from ssim_kd.projects.vfm.vit import vit_teacher
from tests.helpers import (
    bfloat16_without_onednn,
    build,
    distilled_config,
    full_config,
    gradients,
    make_batch,
    train_losses,
)
from tests.projects import method
from tests.projects.method import detector, distilled

timm = pytest.importorskip("timm")

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}
# With a class token and registers; learned and rotary positions; mean and deviation of one channel
# after the other, in [0, 1].
IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
STATISTICS = {"vit_tiny_patch16_224": ((0.5, 0.5),) * 3, "vit_small_patch16_dinov3": IMAGENET}
VITS = {
    "vit_tiny_patch16_224": {**TINY, "reg_tokens": 2},
    "vit_small_patch16_dinov3": TINY,
}
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vits")
    files = {}
    for name, options in VITS.items():
        torch.manual_seed(5)
        files[name] = folder / f"{name}.pth"
        torch.save(timm.create_model(name, num_classes=0, **options).state_dict(), files[name])
    return files


def teacher_of(weights: dict[str, Path], name: str = NAME, **kwargs: Any) -> FrozenTeacher:
    return vit_teacher(name, str(weights[name]), VITS[name], **kwargs)


def model_of(vit: FrozenTeacher, kind: str = "faster", level: str = "p4") -> DistilledDetector:
    distiller = VFMDistiller(vit=vit, levels=[level])
    return distilled(detector(kind), method.teacher_of(kind), distiller)


def reference_tokens(name: str, file: Path, images: list[torch.Tensor]) -> torch.Tensor:
    """Patch tokens (N, D, h, w) of BGR images in [0, 255], without any of our modules."""
    vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **VITS[name])
    vit.load_state_dict(torch.load(file))
    height, width = (16 * -(-max(x.shape[i] for x in images) // 16) for i in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    for x, image in zip(batch, images, strict=True):
        for c, (mean, std) in enumerate(STATISTICS[name]):
            x[c, : image.shape[1], : image.shape[2]] = (image[2 - c] / 255 - mean) / std
    with torch.no_grad():
        sequence = vit.eval().forward_features(batch)
    # A class token and registers come first.
    patches = sequence[:, -(height // 16) * (width // 16) :]
    return patches.unflatten(1, (height // 16, width // 16)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", list(VITS))
def test_vit_teacher_gives_the_patch_tokens_of_rgb_images(name, weights) -> None:
    teacher = teacher_of(weights, name)
    assert {p.device.type for p in teacher.model.backbone.parameters()} == {"meta"}
    teacher = teacher.load(["tokens"], image_format="BGR")
    images = [x["image"] for x in make_batch(((64, 96), (50, 70)))]
    tokens = teacher(images)["tokens"]
    assert tokens.shape == (2, 32, 4, 6) and not tokens.requires_grad
    expected = reference_tokens(name, weights[name], images)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def resized(tokens: Any, ratio: float) -> Any:
    """Bilinear: a cell takes what lies at its centre."""
    d, height, width = tokens.shape
    out = np.zeros((d, math.floor(height * ratio), math.floor(width * ratio)))
    for y in range(out.shape[1]):
        for x in range(out.shape[2]):
            v, u = (max((k + 0.5) / ratio - 0.5, 0.0) for k in (y, x))
            for row, a in ((math.floor(v), 1 - v % 1), (math.floor(v) + 1, v % 1)):
                for column, b in ((math.floor(u), 1 - u % 1), (math.floor(u) + 1, u % 1)):
                    at = tokens[:, min(row, height - 1), min(column, width - 1)]
                    out[:, y, x] += a * b * at
    return out


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_vfm_equals_a_loop_over_cells(stride, weights) -> None:
    vit = teacher_of(weights)
    level = {8: "p3", 16: "p4", 32: "p5"}[stride]
    model = model_of(vit, level=level)
    inputs = make_batch(((64, 96), (40, 64)))
    maps = {}
    model.student.backbone.register_forward_hook(lambda _m, _i, output: maps.update(output))
    total = train_losses(model, inputs)["loss_distill"]
    tokens = vit.load()([x["image"] for x in inputs])["tokens"].double().numpy()
    adapter = model.distillers["vfm"].adapters[level]
    weight, bias = (x.detach().double().numpy() for x in (adapter.weight, adapter.bias))
    means = []
    for i, x in enumerate(inputs):
        target = resized(tokens[i], 16 / stride)
        height, width = x["image"].shape[1:]
        losses = []
        for row in range(min(-(-height // stride), target.shape[1])):
            for column in range(min(-(-width // stride), target.shape[2])):
                cell = maps[level][i, :, row, column].detach().double().numpy()
                s, t = weight[:, :, 0, 0] @ cell + bias, target[:, row, column]
                losses.append(1 - s @ t / math.sqrt((s @ s) * (t @ t)))
        means.append(np.mean(losses))
    assert float(total.detach()) == pytest.approx(np.mean(means), rel=1e-4)


def test_vfm_by_hand_and_at_its_optimum(weights) -> None:
    distiller = VFMDistiller(vit=teacher_of(weights), levels=["p4"])
    distiller.bind_shapes(*({"p4": ShapeSpec(channels=2, stride=16)},) * 2)
    torch.nn.init.dirac_(distiller.adapters["p4"].weight)
    student = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
    teacher = torch.tensor([[[[3.0, 1.0]], [[4.0, 0.0]]]])
    maps = [student, teacher, 5 * student, torch.zeros_like(student)]
    found = [
        float(
            distiller.level_loss(
                distiller.align("p4", student, other, DistillBatch([(16, 32)])),
                DistillBatch([(16, 32)]),
            ).detach()
        )
        for other in maps[1:]
    ]
    # Cosines 3/5 and 0; twice 1; undefined, which counts as 0.
    assert found == pytest.approx([1 - (0.6 + 0) / 2, 0, 1], abs=1e-6)


def test_the_vit_is_hidden_and_frozen(weights) -> None:
    model = model_of(teacher_of(weights))
    model.train()
    before = {n for n, _ in model.named_parameters()}
    loss = train_losses(model)["loss_distill"]
    loss.backward()
    assert {n for n, _ in model.named_parameters()} == before
    own = {f"distillers.vfm.adapters.p4.{n}" for n in ("weight", "bias")}
    assert {n for n in model.state_dict() if "vfm" in n or "vit" in n} == own
    assert not any("vit" in n for n, _ in model.named_modules())
    vit = model.distillers["vfm"].loaded_vit
    assert not any(m.training for m in vit.backbone.modules())
    assert not any(p.requires_grad or p.grad is not None for p in vit.backbone.parameters())
    saved = torch.load(weights[NAME])
    loaded = vit.backbone.module.vit.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)
    trained = gradients(model)
    assert own <= set(trained) and trained["backbone.fpn_output4.weight"].any()
    assert all(n in own or n.startswith("backbone") for n in trained)
    # It follows the device, and keeps its dtype.
    model.to("meta")
    assert {p.device.type for p in vit.backbone.parameters()} == {"meta"}
    assert vit.pixel_mean.device.type == "meta"


@pytest.mark.parametrize(("kind", "level"), [("faster", "p6"), ("retinanet", "p7")])
def test_vfm_survives(kind, level, weights) -> None:
    # One image whose level has one cell; no box; half precision in both.
    model = model_of(teacher_of(weights, dtype=torch.bfloat16), kind=kind, level=level)
    flat = make_batch(((128, 128),))
    flat[0]["instances"].gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 8.0, 30.0]]))
    none = make_batch(((128, 128),))
    none[0]["instances"] = none[0]["instances"][[]]
    for batch in (flat, none):
        with bfloat16_without_onednn(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = train_losses(model, batch)["loss_distill"]
        assert loss.dtype == torch.float32 and 0 < float(loss.detach()) < 2
        loss.backward()
    vit = model.distillers["vfm"].loaded_vit
    assert next(vit.backbone.parameters()).dtype == torch.bfloat16
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_wrong_levels(weights) -> None:
    with pytest.raises(ValueError, match=r"^levels names 'p9'.*p4"):
        model_of(teacher_of(weights), level="p9")
    with pytest.raises(ValueError, match=r"^levels is .* one level"):
        VFMDistiller(vit=teacher_of(weights), levels=["p3", "p4"])


@pytest.mark.parametrize(
    ("argument", "changed", "word"),
    [
        ("name", {"NAME": "vit_smal_patch16_dinov3"}, "vit_small_patch16_dinov3"),
        ("name", {"NAME": "resnet18"}, "resnet18"),
        ("name", {"OPTS": ["depht", 1]}, "depht"),
        ("name", {"OPTS": ["dynamic_img_size", False]}, "images of any size"),
        ("weights", {"WEIGHTS": "nowhere.pth"}, "nowhere.pth"),
        ("weights", {"WEIGHTS": "vit_small_patch16_dinov3"}, "does not fit"),
        ("options", {"OPTS": ["embed_dim"]}, "embed_dim"),
        ("options", {"OPTS": ["pretrained", True]}, "pretrained"),
    ],
)
def test_a_vit_that_is_wrong(argument, changed, word, weights) -> None:
    """Python names the argument, a config its key; a file is read when it is first needed."""
    options = [x for pair in VITS[NAME].items() for x in pair]
    values = {"NAME": NAME, "WEIGHTS": NAME, "OPTS": options, **changed}
    values["WEIGHTS"] = str(weights.get(values["WEIGHTS"], values["WEIGHTS"]))
    key = {"name": "NAME", "weights": "WEIGHTS", "options": "OPTS"}[argument]
    cfg = full_config()
    cfg.MODEL.DISTILL.NAME = "VFMDistiller"
    cfg.MODEL.DISTILL.VFM.update(values)
    with pytest.raises(ValueError, match=rf"^MODEL\.DISTILL\.VFM\.{key} ") as caught:
        train_losses(
            distilled(detector("faster"), method.teacher_of("faster"), *build_distillers(cfg))
        )
    assert word in str(caught.value)
    if len(values["OPTS"]) % 2 == 0:
        pairs = dict(zip(values["OPTS"][::2], values["OPTS"][1::2], strict=True))
        with pytest.raises(ValueError, match=f"^{argument} ") as caught:
            vit_teacher(values["NAME"], values["WEIGHTS"], pairs).load()
        assert word in str(caught.value) and "MODEL." not in str(caught.value)


def test_vit_teacher_without_a_connection(monkeypatch) -> None:
    def fail(*_args, **_kwargs):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    teacher = vit_teacher("vit_small_patch16_dinov3", "timm", TINY)
    with pytest.raises(ValueError, match=r"^weights is 'timm'.*no connection"):
        teacher.load()


def test_a_detector_that_nothing_reads_is_neither_loaded_nor_run(weights, tmp_path) -> None:
    cfg = distilled_config("faster", "faster", tmp_path / "nowhere.pth")
    cfg.MODEL.DISTILL.NAME = "VFMDistiller"
    cfg.MODEL.DISTILL.IN_FEATURES = ["p4"]
    vfm = cfg.MODEL.DISTILL.VFM
    vfm.NAME, vfm.WEIGHTS = NAME, str(weights[NAME])
    vfm.OPTS = [x for pair in VITS[NAME].items() for x in pair]
    model = build(cfg)
    model.load_teacher()
    assert train_losses(model)["loss_distill"] > 0
    assert model.loaded_teacher is None and model.distillers["vfm"].loaded_vit is not None
