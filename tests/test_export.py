"""Exported students detect what PyTorch's do; and what cannot be exported says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from ssim_kd.__main__ import main
from ssim_kd.config import read_classes
from ssim_kd.data import register_datasets
from ssim_kd.export import student
from ssim_kd.export.formats import (
    CLASSES,
    ExportedDetector,
    ExportError,
    agreement,
    export_onnx,
    export_torchscript,
    output_names,
    quantize,
    raw_detections,
    tracing_adapter,
)
from tests.documentation import ROOT, fences
from tests.helpers import build, full_config, save_weights, small_opts, stock_config
from tools import benchmark_student, pairs

FORMATS = ("stock", *student.FILES)

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")

# None of which the model was traced with; the second is not a multiple of its stride.
SIZES = ((96, 128), (70, 90), (128, 64))


def detector(kind: str) -> nn.Module:
    """A random detector with scores far enough apart that rounding does not reorder them."""
    model = build(stock_config(kind))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # what one batch shows is what they keep
    with torch.no_grad():
        model.backbone(model.preprocess_image(noise(*SIZES)).tensor)
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_score.weight", "objectness_logits.weight")):
            parameter.data *= 10
    return model.eval()


def noise(*sizes: tuple[int, int]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"image": torch.rand(3, *size, generator=generator) * 255} for size in sizes]


def check(exported: ExportedDetector, model: nn.Module, batch: list[dict], pixels: float) -> None:
    """The exported detector finds the same on a batch, up to rounding."""
    with torch.no_grad():
        expected = raw_detections(model, batch)
    found = exported.raw(batch)
    assert [f.image_size for f in found] == [tuple(x["image"].shape[-2:]) for x in batch]
    row = agreement(found, expected, score=0.0)
    assert row["expected"] >= 20 * len(batch)
    assert row["matched"] >= 0.98 * row["expected"] and row["more"] <= 0.02 * row["expected"]
    assert row["pixels"] <= pixels and row["score"] <= 1e-4


def check_quantized(model: nn.Module, path: Path) -> None:
    """An ONNX file in 8 bits is smaller, and near to what it was."""
    target = path.with_name("model_int8.onnx")
    given = noise(*[(96, 128)] * 4)
    quantize(path, target, (x["image"].numpy() for x in given))
    assert target.stat().st_size < 0.5 * path.stat().st_size
    with torch.no_grad():
        (expected,) = raw_detections(model, given[:1])
    (found,) = ExportedDetector.onnx(target, threads=1).raw(given[:1])
    ratio = float(found.scores.mean() / expected.scores.mean())
    assert ratio == pytest.approx(1, abs=0.25) and ratio != 1


@pytest.mark.parametrize("kind", ["mask", "retinanet"])
def test_export_detects_the_same_at_any_size(kind, tmp_path: Path) -> None:
    model = detector(kind)
    adapter = tracing_adapter(model, [(96, 96)])
    names = output_names(adapter)
    masks = ["masks"] if kind == "mask" else []
    assert names == ["boxes", "classes", *masks, "scores", "size"]
    export_torchscript(adapter, tmp_path / "model.ts")
    export_onnx(adapter, tmp_path / "model.onnx")
    script = ExportedDetector.torchscript(tmp_path / "model.ts", names)
    onnx = ExportedDetector.onnx(tmp_path / "model.onnx", threads=1)
    for size in SIZES:
        check(script, model, noise(size), pixels=1e-4)
        check(onnx, model, noise(size), pixels=0.05)
    (found,) = onnx([{**noise((64, 96))[0], "height": 128, "width": 192}])
    assert found["instances"].image_size == (128, 192)
    if kind == "retinanet":
        check_quantized(model, tmp_path / "model.onnx")
    else:
        assert found["instances"].pred_masks.shape[1:] == (128, 192)


def test_export_of_a_batch_takes_images_of_unlike_sizes(tmp_path: Path) -> None:
    model = detector("faster")
    adapter = tracing_adapter(model, [(96, 96), (64, 128)])
    assert output_names(adapter)[4:] == ["boxes1", "classes1", "scores1", "size1"]
    export_onnx(adapter, tmp_path / "model.onnx")
    onnx = ExportedDetector.onnx(tmp_path / "model.onnx", threads=1)
    for sizes in ((SIZES[0], SIZES[1]), (SIZES[2], SIZES[2])):
        check(onnx, model, noise(*sizes), pixels=0.05)


def test_export_names_what_cannot_be_exported(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(
        model_zoo.get_config_file("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
    )
    cfg.merge_from_list(small_opts())
    with pytest.raises(ExportError, match="PanopticFPN"):
        tracing_adapter(build(cfg).eval(), [(64, 64)])
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"))
    cfg.merge_from_list([*small_opts(), "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8]])
    model = build(cfg).eval()
    adapter = tracing_adapter(model, [(64, 64)])
    export_torchscript(adapter, tmp_path / "model.ts")
    script = ExportedDetector.torchscript(tmp_path / "model.ts", output_names(adapter))
    (given,) = noise((64, 96))
    (found,), (expected,) = script.raw([given]), raw_detections(model, [given])
    assert len(found) and torch.equal(found.pred_keypoints, expected.pred_keypoints)
    with pytest.raises(ExportError, match=r"ONNX.*Keypoint"):
        export_onnx(adapter, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def boxes(*rows: tuple[float, float, float, float, int, float]) -> Instances:
    table = torch.tensor(rows).view(-1, 6)
    found = Instances((100, 100), scores=table[:, 5])
    found.pred_boxes, found.pred_classes = Boxes(table[:, :4]), table[:, 4].long()
    return found


def test_agreement_pairs_by_class_and_place() -> None:
    expected = boxes((0, 0, 40, 40, 1, 0.9), (50, 50, 90, 90, 2, 0.8), (0, 0, 40, 40, 3, 0.01))
    same = boxes((50, 50, 90, 90.5, 2, 0.7), (0, 0, 40, 40, 1, 0.9))
    row = agreement([same], [expected])
    assert (row["expected"], row["matched"], row["more"]) == (2, 2, 0)
    assert row["pixels"] == pytest.approx(0.5) and row["score"] == pytest.approx(0.1)
    other = boxes((0, 0, 40, 40, 2, 0.9), (50, 50, 90, 60, 2, 0.8))
    row = agreement([other], [expected])
    assert (row["matched"], row["more"]) == (0, 2)
    assert agreement([boxes()], [expected])["matched"] == 0
    flat = boxes((5, 5, 5, 40, 1, 0.9))  # no area, hence no overlap
    assert agreement([flat], [flat])["matched"] == 1


def digits_config(tmp_path: Path) -> Path:
    """The config of a training on a few digits, with random weights next to it."""
    cfg = full_config()
    cfg.merge_from_file("configs/Digits-Detection/plain_faster_rcnn_R_50_w4_demo.yaml")
    cfg.DATASETS.DIGITS.ROOT = str(tmp_path / "digits")
    cfg.DATASETS.DIGITS.NUM_IMAGES = (4, 2, 4)
    cfg.DATASETS.DIGITS.IMAGE_SIZE = 64
    cfg.DATASETS.DIGITS.DIGITS_PER_IMAGE = (1, 2)
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    save_weights(cfg, tmp_path / "wrapped.pth")
    state = torch.load(tmp_path / "wrapped.pth", weights_only=True)["model"]
    state = {name.removeprefix("student."): value for name, value in state.items()}
    torch.save({"model": state}, tmp_path / "model_final.pth")
    return tmp_path / "config.yaml"


STOCK = """
del sys.modules["detectron2"]
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file("export/student.yaml")
cfg.MODEL.WEIGHTS = "export/model.pth"
predictor = DefaultPredictor(cfg)
saved = torch.load("export/model.pth")["model"]
assert all(torch.equal(saved[k], v) for k, v in predictor.model.state_dict().items())
print(predictor(np.zeros((96, 96, 3), dtype=np.uint8))["instances"].image_size)
"""

FCOS = """
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from tools.pairs import fcos

model = L(fcos)(channels=32)
_test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="digits_test", filter_empty=False),
    mapper=L(DatasetMapper)(
        is_train=False, image_format="BGR",
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=64)],
    ),
    num_workers=0,
)
dataloader = dict(
    test=_test,
    train=dict(dataset=L(get_detection_dataset_dicts)(names="digits_train")),
    evaluator=L(COCOEvaluator)(dataset_name="digits_test"),
)
train = dict(device="cpu", init_checkpoint="", output_dir="output")
"""


def test_main_writes_what_runs_and_benchmark_times_it(tmp_path: Path, capsys) -> None:
    config, output = digits_config(tmp_path), tmp_path / "export"
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    formats = [
        "--formats",
        *["stock", "torchscript", "onnx", "int8"],
        "--compare",
        "2",
        "--calibrate",
        "2",
    ]
    arguments = ["export", "--config-file", str(config), *formats, "--evaluate"]
    arguments += ["--output", str(output)]
    assert main([*arguments, *weights]) == 0
    found = json.loads((output / "export.json").read_text())
    assert set(found["agreement"]) == {"torchscript", "onnx", "int8"}
    assert set(found["AP"]) == {"pytorch", "torchscript", "onnx", "int8"}
    assert found["AP"]["torchscript"] == pytest.approx(found["AP"]["pytorch"], abs=0.5)
    assert found["agreement"]["torchscript"]["more"] == 0

    # The example of docs/export.md needs neither Detectron2 nor ssim_kd, DefaultPredictor not ours.
    Image.new("RGB", (80, 48)).save(tmp_path / "photo.png")
    (example,) = fences(ROOT / "docs/export.md", "python")
    code = "import sys; sys.modules['detectron2'] = sys.modules['ssim_kd'] = None\n"
    code += example + "print(len([tensor.numpy() for tensor in found.values()]))\n" + STOCK
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout.splitlines()[-2]) == len(found["outputs"])

    stock = get_cfg()
    stock.merge_from_file(str(output / "student.yaml"))
    assert stock.MODEL.DEVICE == "cpu" and stock.MODEL.WEIGHTS == "model.pth"
    assert stock.OUTPUT_DIR == get_cfg().OUTPUT_DIR  # not that of the training
    with pytest.raises(AssertionError, match=r"model\.pth"):  # no untrained detector
        DefaultPredictor(stock)
    moved = tmp_path / "elsewhere"
    shutil.copytree(output, moved)
    shutil.rmtree(output / "inference")
    assert str(tmp_path) not in (moved / "student.yaml").read_text()
    weights_there = str(moved / stock.MODEL.WEIGHTS)
    assert DetectionCheckpointer(build_model(stock)).load(weights_there) == {}
    # All know the names of their classes.
    digits = [str(digit) for digit in range(10)]
    assert found["classes"] == digits == read_classes(str(moved / "student.yaml"))
    inside = {CLASSES: ""}
    torch.jit.load(str(moved / "model.ts"), _extra_files=inside)
    assert json.loads(inside[CLASSES]) == digits
    for name in ("model.onnx", "model_int8.onnx"):
        props = onnxruntime.InferenceSession(str(moved / name)).get_modelmeta()
        assert json.loads(props.custom_metadata_map[CLASSES]) == digits

    benchmark = ["--images", "2", "--warmup", "1", "--output", str(tmp_path / "benchmark.json")]
    arguments = ["--config-file", str(config), "--exported", str(output), *benchmark, *weights]
    benchmark_student.main(arguments)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert set(rows) == {f"student{k}" for k in ("", ", torchscript", ", onnx", ", int8")}
    model = build_model(stock)
    assert rows["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert rows["student"]["flops"] > 1e6
    assert all(np.isfinite(row["images_per_s"]) for row in rows.values())
    assert "GFLOPs" in capsys.readouterr().out


def test_main_of_a_lazy_config(tmp_path: Path) -> None:
    cfg = full_config()
    cfg.merge_from_file(str(digits_config(tmp_path)))
    register_datasets(cfg)
    torch.manual_seed(0)
    torch.save({"model": pairs.fcos(32).state_dict()}, tmp_path / "fcos.pth")
    (tmp_path / "fcos.py").write_text(FCOS)
    output = tmp_path / "export"
    arguments = ["export", "--config-file", str(tmp_path / "fcos.py"), "--output", str(output)]
    formats = ["--evaluate", "--formats", "stock", "torchscript", "--compare", "2"]
    weights = f"train.init_checkpoint={tmp_path / 'fcos.pth'}"
    assert main([*arguments, *formats, weights]) == 0
    found = json.loads((output / "export.json").read_text())
    assert set(found["agreement"]) == {"torchscript"} and len(found["AP"]) == 2
    model = instantiate(LazyConfig.load(str(output / "student.yaml")).model)
    model.load_state_dict(torch.load(output / "model.pth", weights_only=True)["model"])


def test_main_writes_the_rest_where_onnx_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_):
        raise ExportError("no such operator")

    monkeypatch.setattr(student, "export_onnx", fail)
    config, output = digits_config(tmp_path), tmp_path / "export"
    arguments = ["export", "--config-file", str(config), "--output", str(output), "--compare", "0"]
    assert main([*arguments, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]) == 1
    assert "no such operator" in capsys.readouterr().err
    assert {"student.yaml", "model.pth", "model.ts", "export.json"} <= {
        path.name for path in output.iterdir()
    }


def test_main_refuses_a_batch_that_is_not_evaluated(tmp_path: Path, capsys) -> None:
    arguments = ["export", "--config-file", "x", "--output", str(tmp_path), "--batch", "2"]
    assert main([*arguments, "--evaluate"]) == 1
    assert "--batch is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[90.0]", "MODEL.PIXEL_STD", "[57.0]"], "match"),
        (["DATASETS.TEST", "()"], "Not compared"),
        (["DATASETS.TEST", "('of_my_code',)", "DATASETS.TRAIN", "('mine',)"], "Not compared"),
    ],
)
def test_main_asks_for_no_more_than_its_task(options, said, tmp_path: Path, capsys) -> None:
    cfg = full_config()
    cfg.merge_from_file(str(digits_config(tmp_path)))
    cfg.merge_from_list(options)
    config, output = tmp_path / "config.yaml", tmp_path / "export"
    config.write_text(cfg.dump())
    save_weights(cfg, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    state = {name.removeprefix("student."): value for name, value in state.items()}
    torch.save({"model": state}, tmp_path / "model.pth")
    where = ["--config-file", str(config), "--output", str(output), "--compare", "1"]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    formats = ["stock", "torchscript"] if said == "match" else ["stock"]
    assert main(["export", "--formats", *formats, *where, *weights]) == 0
    text = capsys.readouterr().out
    assert said in text or (said == "match" and "not compared: the student" in text)
    if "mine" in str(options):
        for flags in (["--evaluate"], ["--formats", "int8"]):
            assert main(["export", *flags, *where, *weights]) == 1
            assert "DATASETS." in capsys.readouterr().err
