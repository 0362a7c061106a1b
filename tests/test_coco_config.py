"""The COCO config as its users run it, narrower, on a stand-in of COCO and of the zoo.

At full width each config is built by tests/test_configs.py.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from PIL import Image

from ssim_kd.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "COCO-Detection" / "ssim_faster_rcnn_R_50_FPN_1x.yaml"
ZOO = "COCO-Detection/faster_rcnn_{}.yaml"
# 8 channels in the bottlenecks of res2, in place of 64 and 256.
NARROW = ["MODEL.RESNETS.WIDTH_PER_GROUP", 1, "MODEL.RESNETS.NUM_GROUPS", 8]
NARROW += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 128]


def make_coco(root: Path) -> None:
    """COCO's folders and categories, with images of some pixels."""
    random = np.random.default_rng(0)
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        sizes = [(60, 80), (80, 60), (50, 90), (64, 64)]
        for i, (height, width) in enumerate(sizes):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i:012d}.jpg")
        content = {
            "images": [
                {"id": i, "file_name": f"{i:012d}.jpg", "height": h, "width": w}
                for i, (h, w) in enumerate(sizes)
            ],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": i,
                    "category_id": categories[i]["id"],
                    "bbox": [5, 5, 30, 25],
                    "area": 750,
                    "iscrowd": 0,
                }
                for i in range(len(sizes))
            ],
            "categories": categories,
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def make_zoo_weights(name: str, path: Path) -> None:
    """Random weights in the zoo's format, with features of the size of trained ones."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.merge_from_list(NARROW)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    model.backbone.bottom_up.stem.conv1.norm.weight.fill_(0.01)
    for block in model.modules():
        if isinstance(block, BottleneckBlock):
            block.conv3.norm.weight.fill_(0.2)
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "stand-in"}))


def test_two_steps_then_resume_and_evaluation(tmp_path: Path, monkeypatch) -> None:
    make_coco(tmp_path / "datasets" / "coco")
    make_zoo_weights(ZOO.format("X_101_32x8d_FPN_3x"), tmp_path / "teacher.pkl")
    make_zoo_weights(ZOO.format("R_50_FPN_1x"), tmp_path / "student.pkl")
    monkeypatch.chdir(tmp_path)

    def train(iterations: int, *flags: str) -> None:
        overrides = {
            "MODEL.DEVICE": "cpu",
            "MODEL.WEIGHTS": "student.pkl",
            "MODEL.DISTILL.TEACHER.WEIGHTS": "teacher.pkl",
            "MODEL.DISTILL.TEACHER.OPTS": NARROW,
            "INPUT.MIN_SIZE_TRAIN": "(96,)",
            "INPUT.MIN_SIZE_TEST": 96,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "SOLVER.MAX_ITER": iterations,
            "DATALOADER.NUM_WORKERS": 0,
            "OUTPUT_DIR": "output",
        }
        pairs = [*map(str, NARROW), *(str(x) for pair in overrides.items() for x in pair)]
        assert main(["train", "--config-file", str(CONFIG), *flags, *pairs]) == 0

    train(2)
    output = tmp_path / "output"
    first = torch.load(output / "model_final.pth", weights_only=True)
    assert first["iteration"] == 1
    assert set(first["distillers"]) == {
        f"ssim.adapters.p{level}.{kind}" for level in range(2, 7) for kind in ("weight", "bias")
    }

    train(3, "--resume")
    log = (output / "log.txt").read_text()
    assert "Resuming from" in log
    assert "Evaluation results for coco_2017_val" in log
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = {row["iteration"]: row["loss_distill"] for row in rows if "loss_distill" in row}
    assert set(losses) == {1, 2}
    # Five levels at weight 4, each (1 - SSIM) / 2 of unrelated maps: about a half.
    assert 2 < losses[2] < 20
