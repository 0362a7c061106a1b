"""A config of the zoo that YAML cannot hold (its norm is a lambda), from the first command on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate

from ssim_kd.__main__ import main
from ssim_kd.engine.train_loop import DistillStep
from tests.data.coco_sets import content, write
from tests.engine.runs import checkpoint, log, metrics

SMALL = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet

_zoo = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
model, dataloader, optimizer = _zoo.model, _zoo.dataloader, _zoo.optimizer
lr_multiplier, train = _zoo.lr_multiplier, _zoo.train
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock, num_blocks=1, stride_per_block=[1 + min(i, 1)], norm="BN",
        in_channels=8 * 2 ** max(i - 1, 0), out_channels=8 * 2**i,
    )
    for i in range(4)
]
model.backbone.bottom_up.stem.out_channels = 8
model.backbone.bottom_up.stem.norm = model.backbone.norm = "BN"
model.backbone.out_channels = model.proposal_generator.head.in_channels = {width}
model.proposal_generator.anchor_generator.sizes = [[4], [8], [16], [32], [64]]
model.proposal_generator.pre_nms_topk = model.proposal_generator.post_nms_topk = (20, 20)
_heads = model.roi_heads
_heads.batch_size_per_image = 8
_heads.box_head.input_shape = ShapeSpec(channels={width}, height=7, width=7)
_heads.box_head.conv_dims, _heads.box_head.fc_dims = [8], [8]
_heads.box_predictor.input_shape = ShapeSpec(channels=8)
_heads.mask_head.input_shape = ShapeSpec(channels={width}, width=14, height=14)
_heads.mask_head.conv_dims = [8, 8]
_resize, _crop, _ = dataloader.train.mapper.augmentations
_resize.target_height = _resize.target_width = 64
_resize.min_scale, _crop.crop_size = 0.8, (64, 64)
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.train.total_batch_size, dataloader.train.num_workers = 2, 0
dataloader.test.num_workers, optimizer.lr, train.report = 0, 0.001, False
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a student, a teacher and data with masks."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("student", 8), ("teacher", 16)):
        (tmp_path / f"{name}.py").write_text(SMALL.format(width=width))
    data = content(num_images=4)
    for found in data["annotations"]:
        x, y, w, h = found["bbox"]
        found["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    json_file, images = write(tmp_path / "data", data)
    lines = [f"{k}: {{json: {json_file}, images: {images}}}\n" for k in ("train", "val")]
    (tmp_path / "data.yaml").write_text("".join(lines))
    return tmp_path


def command(name: str, config: str, *rest: str) -> None:
    assert main([name, "--config-file", config, "--data", "data.yaml", *rest]) == 0


def test_from_a_teacher_to_an_exported_student(user, monkeypatch, caplog, capsys) -> None:
    command("train", "teacher.py", "--epochs", "0.5", "train.output_dir=teacher")
    assert not list(user.rglob("*.pkl")) and "serialize" not in caplog.text

    distil = ("train", "student.py", "--teacher", "teacher", "--epochs", "2")
    folder = "train.output_dir=distilled"
    step = DistillStep.run_step

    def stopped(self: DistillStep) -> None:
        step(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(DistillStep, "run_step", stopped)
        command(*distil, folder)
    assert ended.value.code == 143
    command(*distil, "--resume", folder)
    run = user / "distilled"
    assert checkpoint(run)["iteration"] == 3 and "Resuming from" in log(run)
    assert "loss_distill" in set().union(*metrics(run))

    # Stock Detectron2 reads the student.
    stock = instantiate(LazyConfig.load(str(run / "student.yaml")).model)
    DetectionCheckpointer(stock).load(str(run / "model_final.pth"))
    saved = checkpoint(run)["model"]
    assert all(torch.equal(saved[k], v) for k, v in stock.state_dict().items())
    assert stock.roi_heads.box_head.conv1.norm._stats_mode == "N"

    weights = "train.init_checkpoint=distilled/model_final.pth"
    command("eval", "student.py", "train.output_dir=evaluated", weights)
    command("visualize", *distil[1:4], "--output", "pictures", "--images", "1", weights)
    assert (user / "pictures/000.png").stat().st_size > 10_000
    command("export", "student.py", "--output", "export", "--formats", "stock", weights)
    assert main(["report", "distilled"]) == 0

    again = ("train.output_dir=again", "train.max_iter=1")
    command("train", "student.py", "--teacher", "distilled/model_final.pth", *again)
    with pytest.raises(SystemExit):
        command("eval", "distilled/student.yaml")
    assert "expected the .py of that training" in capsys.readouterr().err
