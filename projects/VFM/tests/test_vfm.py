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

from ssim_kd.modeling import DistillBatch, DistilledDetector, FrozenTeacher, SSIMDistiller
from ssim_kd.projects.vfm import VFMDistiller
from ssim_kd.projects.vfm.vit import vit_teacher
from tests.helpers import (
    bfloat16_without_onednn,
    build,
    distilled_config,
    gradients,
    make_batch,
    stock_config,
    train_losses,
)

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


def distilled(vit: FrozenTeacher, *more: Any, kind: str = "faster", level: str = "p4", **options):
    return DistilledDetector(
        student=build(stock_config(kind)),
        teacher=FrozenTeacher(build(stock_config(kind, fpn=48), seed=1)),
        distillers=[VFMDistiller(vit=vit, levels=[level], **options), *more],
        max_iter=10,
    )


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
    """Bilinear: a cell takes the value at its centre."""
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
    model = distilled(vit, level=level)
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
    model = distilled(teacher_of(weights))
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
    model = distilled(teacher_of(weights, dtype=torch.bfloat16), kind=kind, level=level)
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


def test_two_halves_are_the_whole(weights) -> None:
    vit = teacher_of(weights)
    distiller = distilled(vit).distillers["vfm"]
    images = [x["image"] for x in make_batch(((64, 96), (40, 64), (64, 64), (48, 96)))]
    student, found = torch.randn(4, 32, 4, 6), []
    for half in (slice(0, 4), slice(0, 2), slice(2, 4)):
        batch = DistillBatch([tuple(x.shape[1:]) for x in images[half]], images=images[half])
        found.append(float(distiller({"p4": student[half]}, {}, batch)[0].detach()))
    assert found[0] == pytest.approx((found[1] + found[2]) / 2, rel=1e-5)


def test_vfm_beside_ssim_by_a_config(weights, tmp_path) -> None:
    cfg = distilled_config("faster", "retinanet", tmp_path / "unread.pth")
    cfg.MODEL.DISTILL.VFM.WEIGHTS = str(weights[NAME])
    options = [x for pair in VITS[NAME].items() for x in pair]
    cfg.MODEL.DISTILL.TERMS = [
        ["SSIMDistiller", "LOSS_WEIGHT", 4.0],
        ["VFMDistiller", "IN_FEATURES", ["p4"], "VFM.NAME", NAME, "VFM.OPTS", options],
    ]
    model = build(cfg)
    assert isinstance(model.distillers["ssim"], SSIMDistiller)
    # The detector's levels, which do not include p2, are not the ViT's.
    assert model.distillers["ssim"].levels == ["p3", "p4", "p5", "p6"]
    model.teacher._load = lambda _: (build(stock_config("retinanet", fpn=48), seed=1), "")
    loss = train_losses(model)["loss_distill"]
    parts = [model.metrics[f"distill/{name}_weighted"] for name in ("ssim", "vfm")]
    assert all(part > 0 for part in parts)
    torch.testing.assert_close(sum(parts), loss.detach())


@pytest.mark.parametrize(
    ("level", "named"), [("p9", ("levels", "'p9'", "p4")), ("", ("levels", "one level"))]
)
def test_vfm_with_a_wrong_level(level, named, weights) -> None:
    with pytest.raises(ValueError) as caught:
        if level:
            distilled(teacher_of(weights), level=level)
        else:
            VFMDistiller(vit=teacher_of(weights), levels=["p3", "p4"])
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("vit_smal_patch16_dinov3", {}, ("VFM.NAME", "vit_small_patch16_dinov3")),
        ("resnet18", {}, ("VFM.NAME", "resnet18")),
        (NAME, {"depht": 1}, ("VFM.NAME", "depht")),
        (NAME, {"dynamic_img_size": False}, ("VFM.NAME", "images of any size")),
    ],
)
def test_vit_teacher_of_a_wrong_model(name, options, named, weights) -> None:
    with pytest.raises(ValueError) as caught:
        vit_teacher(name, str(weights[NAME]), options)
    assert all(part in str(caught.value) for part in named)


def test_vit_teacher_of_wrong_weights(weights, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"VFM\.WEIGHTS") as caught:
        vit_teacher(NAME, str(tmp_path / "nowhere.pth"))
    assert "nowhere.pth" in str(caught.value)
    teacher = vit_teacher(NAME, str(weights["vit_small_patch16_dinov3"]), VITS[NAME])
    with pytest.raises(ValueError, match=r"VFM\.WEIGHTS") as caught:
        teacher.load()
    assert NAME in str(caught.value) and "does not fit" in str(caught.value)


def test_vfm_with_odd_opts(weights, tmp_path) -> None:
    cfg = distilled_config("faster", "faster", tmp_path / "unread.pth")
    cfg.MODEL.DISTILL.NAME = "VFMDistiller"
    cfg.MODEL.DISTILL.VFM.OPTS = ["embed_dim"]
    with pytest.raises(ValueError, match=r"VFM\.OPTS is \['embed_dim'\]"):
        build(cfg)


def test_vit_teacher_without_a_connection(monkeypatch) -> None:
    def fail(*_args, **_kwargs):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    teacher = vit_teacher("vit_small_patch16_dinov3", "timm", TINY)
    with pytest.raises(ValueError, match=r"VFM\.WEIGHTS is 'timm'.*no connection"):
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
