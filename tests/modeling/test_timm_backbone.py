"""Students on backbones of timm."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ssim_kd.config import write_stock_config
from ssim_kd.modeling.timm_backbone import TimmBackbone, add_timm_config
from tests.helpers import (
    build,
    distilled_config,
    full_config,
    make_batch,
    stock_config,
    train_losses,
)

timm = pytest.importorskip("timm", reason="the extra timm is not installed")

LIGHT = "mobilenetv3_small_050"
BUILDERS = {"faster": "build_timm_fpn_backbone", "retinanet": "build_retinanet_timm_fpn_backbone"}


def with_timm(cfg: CfgNode, kind: str, name: str = LIGHT, *opts: object) -> CfgNode:
    """A config on a backbone of timm, with random weights."""
    add_timm_config(cfg)  # what a stock config lacks
    levels = ["res3", "res4", "res5"] if kind == "retinanet" else ["res2", "res3", "res4", "res5"]
    keys = {"BACKBONE.NAME": BUILDERS[kind], "TIMM.NAME": name, "TIMM.OUT_FEATURES": levels}
    keys |= {"TIMM.NORM": "BN", "BACKBONE.FREEZE_AT": 0}
    cfg.merge_from_list([x for key, value in keys.items() for x in (f"MODEL.{key}", value)])
    cfg.merge_from_list(list(opts))
    return cfg


def timm_file(path, name: str = LIGHT, *, classes: int = 1000) -> str:
    """Save a random model of timm, whole, as timm's training does."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=classes)
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        (LIGHT, [8, 16, 24, 288]),
        ("efficientnet_lite0", [24, 40, 112, 320]),
        ("convnext_atto", [40, 80, 160, 320]),
    ],
)
def test_timm_backbone_shapes_are_those_of_its_maps(name, channels) -> None:
    backbone = TimmBackbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(2, 3, 64, 96))
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == ["res2", "res3", "res4", "res5"]
    assert [shapes[level].channels for level in maps] == channels
    for level, stride in zip(maps, [4, 8, 16, 32], strict=True):
        assert shapes[level].stride == stride
        assert maps[level].shape == (2, shapes[level].channels, 64 // stride, 96 // stride)
    assert backbone.size_divisibility == 32


def test_timm_backbone_gives_maps_with_channels_last_as_any_other() -> None:
    options = {"strict_img_size": False, "embed_dim": 24, "depths": (1, 1, 1, 1)}
    options["num_heads"] = (1, 1, 2, 2)
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", options=options).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert maps["res3"].shape == (1, 48, 8, 12)


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_detector_on_timm_trains_and_is_stock(kind, tmp_path) -> None:
    cfg = with_timm(stock_config(kind), kind)
    model = build(cfg)
    losses = train_losses(model, make_batch(((64, 96),)))
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert not without
    assert set(model.backbone.output_shape()) == (
        {"p2", "p3", "p4", "p5", "p6"} if kind == "faster" else {"p3", "p4", "p5", "p6", "p7"}
    )
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    again = build(cfg, seed=5)
    found = DetectionCheckpointer(again).load(str(tmp_path / "model.pth"))
    assert found == {}
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_stock_config_of_a_timm_student_is_read_after_two_lines(tmp_path) -> None:
    cfg = with_timm(full_config(), "faster")
    write_stock_config(cfg, str(tmp_path / "student.yaml"))
    stock = get_cfg()
    with pytest.raises(KeyError, match="TIMM"):
        stock.merge_from_file(str(tmp_path / "student.yaml"))
    assert "import add_timm_config" in (tmp_path / "student.yaml").read_text()
    stock = get_cfg()
    add_timm_config(stock)
    stock.merge_from_file(str(tmp_path / "student.yaml"))
    assert stock.MODEL.TIMM == cfg.MODEL.TIMM


def test_timm_student_is_tapped_below_its_fpn(weights_of) -> None:
    opts = ("MODEL.DISTILL.IN_FEATURES", ["res2", "res5"])
    cfg = with_timm(distilled_config("faster", "faster", weights_of("faster"), *opts), "faster")
    model = build(cfg)
    train_losses(model)["loss_distill"].backward()
    assert any(p.grad is not None for p in model.student.backbone.bottom_up.parameters())
    assert all(p.grad is None for n, p in model.student.backbone.named_parameters() if "fpn_" in n)


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, 0), (1, 1), (2, 2), (5, 5)])
def test_freeze_at_freezes_a_level_and_all_below_it(freeze_at, frozen) -> None:
    backbone = TimmBackbone(LIGHT, norm="BN", freeze_at=freeze_at)
    prefixes = ["body.conv_stem", "body.blocks.0", "body.blocks.1", "body.blocks.2"]
    # The stem has stride 2 (res1), blocks.0 stride 4 (res2), blocks.1 stride 8 (res3).
    last = {0: 0, 1: 1, 2: 2, 5: 4}[frozen]
    free = [n for n, p in backbone.named_parameters() if p.requires_grad]
    for index, prefix in enumerate(prefixes):
        assert any(n.startswith(prefix) for n in free) == (index >= last), prefix
    trained = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.weight.requires_grad for m in trained)
    assert bool(trained) == (frozen < 5)


def test_unused_stages_are_not_trained() -> None:
    backbone = TimmBackbone(LIGHT, norm="BN", out_features=["res2", "res3"])
    backbone.train()
    sum(m.sum() for m in backbone(torch.rand(1, 3, 64, 64)).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", [LIGHT, "regnety_002"])
def test_frozen_norms_keep_their_activations(name) -> None:
    # regnety's norms hold the activation after them.
    torch.manual_seed(0)
    trained = TimmBackbone(name, norm="BN").eval()
    frozen = TimmBackbone(name, norm="FrozenBN").train()
    state = trained.state_dict()
    for key in list(state):
        if key.endswith("running_mean"):
            state[key].normal_(0, 0.1)
        if key.endswith("num_batches_tracked"):
            del state[key]
    frozen.load_state_dict(state)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())
    images = torch.rand(2, 3, 64, 64)
    expected, found = trained(images), frozen(images)
    for level, value in expected.items():
        torch.testing.assert_close(found[level], value, rtol=1e-4, atol=1e-5)


def test_sync_norm_is_set_where_asked_for() -> None:
    backbone = TimmBackbone(LIGHT, norm="SyncBN")
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)


@pytest.mark.parametrize("name", [LIGHT, "convnext_atto"])
@pytest.mark.parametrize("classes", [1000, 7])
def test_pretrained_file_is_loaded_whatever_its_classes(name, classes, tmp_path) -> None:
    path = timm_file(tmp_path / "timm.pth", name, classes=classes)
    backbone = TimmBackbone(name, norm="BN", pretrained=path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    found = dict(backbone.body.state_dict())
    stage = "blocks.1.0.conv_pw.weight" if name == LIGHT else "stages_1.blocks.0.conv_dw.weight"
    assert torch.equal(found[stage], saved[stage.replace("stages_", "stages.")])


def test_pretrained_file_is_not_read_where_weights_are_given(tmp_path) -> None:
    cfg = with_timm(stock_config("faster"), "faster", LIGHT, "MODEL.WEIGHTS", "model_final.pth")
    cfg.MODEL.TIMM.PRETRAINED = str(tmp_path / "gone.pth")
    build_model(cfg)
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.PRETRAINED.*gone\.pth"):
        build_model(cfg)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "other"])
def test_pretrained_file_that_does_not_fit_is_an_error(damage, tmp_path) -> None:
    path = tmp_path / "timm.pth"
    timm_file(path, "mobilenetv3_small_075" if damage == "other" else LIGHT)
    state = torch.load(path, weights_only=True)["state_dict"]
    if damage == "missing":
        del state["blocks.1.0.conv_pw.weight"]
    if damage == "unexpected":
        state["blocks.9.0.conv_pw.weight"] = torch.zeros(1)
    if damage == "shape":
        state["conv_stem.weight"] = torch.zeros(16, 3, 5, 5)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.PRETRAINED.*timm\.pth"):
        TimmBackbone(LIGHT, pretrained=str(path))


def test_pretrained_weights_that_cannot_be_fetched_are_named(monkeypatch) -> None:
    def fail(*_args, **_kwargs):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.PRETRAINED is 'timm'"):
        TimmBackbone(LIGHT, pretrained="timm")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("NAME", "mobilenetv3_smal_050", LIGHT),
        ("NAME", f"{LIGHT}.no_such_tag", LIGHT),
        ("NAME", "vit_tiny_patch16_224", r"\[16, 16, 16\]"),
        ("NAME", "swin_tiny_patch4_window7_224", "strict_img_size"),
        ("OUT_FEATURES", ["res2", "res9"], "res5"),
        ("OUT_FEATURES", [], "res5"),
        ("NORM", "GN", "FrozenBN"),
        ("OPTS", ["drop_path_rate"], "VALUE"),
        ("OPTS", ["no_such_argument", 1], "no_such_argument"),
    ],
)
def test_value_that_does_not_work_is_named(key, value, expected) -> None:
    cfg = with_timm(stock_config("faster"), "faster")
    cfg.MODEL.TIMM[key] = value
    named = "NAME" if value == ["no_such_argument", 1] else key
    with pytest.raises(ValueError, match=rf"MODEL\.TIMM\.{named}") as error:
        build_model(cfg)
    assert error.match(expected)


def test_missing_timm_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"ssim_kd\[timm\]"):
        TimmBackbone(LIGHT)


@pytest.mark.parametrize(("given", "warned"), [("BGR", True), ("RGB", False)])
def test_pixels_unlike_those_of_the_weights_are_a_warning(given, warned, tmp_path, caplog) -> None:
    cfg = with_timm(stock_config("faster"), "faster")
    cfg.MODEL.TIMM.PRETRAINED = timm_file(tmp_path / "timm.pth")
    cfg.INPUT.FORMAT = given
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.280, 103.530]
    cfg.MODEL.PIXEL_STD = [58.395, 57.120, 57.375]
    with caplog.at_level(logging.WARNING):
        build_model(cfg)
    assert ("INPUT.FORMAT" in caplog.text) == warned


@pytest.mark.parametrize(
    "option", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained"]
)
def test_options_that_load_weights_are_refused(option) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.TIMM\.OPTS has \['{option}'\]"):
        TimmBackbone(LIGHT, options={option: "weights.pth"})


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pretrained_file_runs_no_code(tmp_path) -> None:
    torch.save({"state_dict": {"x": Payload(tmp_path / "ran")}}, tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.PRETRAINED"):
        TimmBackbone(LIGHT, pretrained=str(tmp_path / "timm.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_timm_that_unpickles_files_is_refused(monkeypatch) -> None:
    def load_state_dict(path, use_ema=True, device="cpu", weights_only=False):
        raise AssertionError("read")

    monkeypatch.setattr(timm.models, "load_state_dict", load_state_dict)
    with pytest.raises(ImportError, match=r"BACKBONE\.NAME.*1\.0\.26"):
        TimmBackbone(LIGHT)
