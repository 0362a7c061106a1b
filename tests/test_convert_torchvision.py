"""tools/convert_torchvision.py: the R-18 student starts from torchvision's weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone, build_model

from ssim_kd.checkpoint import read_weights
from ssim_kd.config import student_config
from ssim_kd.engine import load_config
from tools.convert_torchvision import convert, main

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "COCO-Detection" / "plain_faster_rcnn_R_18_FPN_1x.yaml"


@pytest.fixture(scope="module")
def resnet() -> torchvision.models.ResNet:
    """A random ResNet whose running statistics are those of some training."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def converted(resnet, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchvision")
    torch.save(resnet.state_dict(), folder / "resnet18.pth")
    target = folder / "pretrained" / "R-18.pkl"
    main([str(folder / "resnet18.pth"), str(target)])
    return target


def test_the_student_gives_torchvisions_features(resnet, converted, caplog) -> None:
    args = argparse.Namespace(config_file=str(CONFIG), opts=["MODEL.DEVICE", "cpu"])
    model = build_model(student_config(load_config(args))).eval()
    caplog.clear()
    DetectionCheckpointer(model).load(str(converted))
    complaints = [r.getMessage() for r in caplog.records if r.levelname != "INFO"]
    # The heads, the FPN and nothing else start at random.
    assert len(complaints) == 1 and "not found in the checkpoint" in complaints[0]
    assert "bottom_up" not in complaints[0]

    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x = ((image / 255 - mean) / std)[None]
    found = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
    with torch.no_grad():
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
        for i in range(1, 5):
            x = getattr(resnet, f"layer{i}")(x)
            scale = float(x.abs().max())
            torch.testing.assert_close(found[f"res{i + 1}"], x, rtol=1e-4, atol=1e-4 * scale)


def test_the_file_is_known_for_a_backbones(converted) -> None:
    weights = read_weights(str(converted), key="MODEL.WEIGHTS")
    assert weights.backbone_only and weights.author == "torchvision"


def test_a_bottleneck_resnet_fits_too() -> None:
    args = argparse.Namespace(
        config_file=str(CONFIG),
        opts=[
            "MODEL.DEVICE",
            "cpu",
            "MODEL.RESNETS.DEPTH",
            50,
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            256,
        ],
    )
    cfg = load_config(args)
    with torch.device("meta"):
        ours = build_backbone(cfg).bottom_up.state_dict()
    theirs = convert(torchvision.models.resnet50(weights=None).state_dict())
    names = {k for k in ours if not k.endswith("num_batches_tracked")}
    assert {k: tuple(ours[k].shape) for k in names} == {k: v.shape for k, v in theirs.items()}


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Not a torchvision ResNet: .*'features\.0"):
        convert({"features.0.weight": torch.zeros(1)})
