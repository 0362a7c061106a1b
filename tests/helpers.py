"""Detectors small enough for tests: a tenth of a second each, of every kind that is paired."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ssim_kd.config import add_distill_config
from ssim_kd.projects import add_project_configs

# Kind of detector: the config of the model zoo that it is a small copy of.
KINDS = {
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "c4": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "dc5": "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
}
#: Channels of the FPN of a student, and of a teacher.
STUDENT_FPN, TEACHER_FPN = 32, 48

# Without pretrained weights only a trained normalisation keeps the activations within bounds.
_SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    # Untrained detectors are sure of nothing: without this they would detect nothing.
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 128,
}


def small_opts(*, fpn: int = STUDENT_FPN) -> list[Any]:
    """Overrides that make a detector of the model zoo small."""
    return [x for pair in ({**_SMALL, "MODEL.FPN.OUT_CHANNELS": fpn}).items() for x in pair]


def stock_config(kind: str, *opts: Any, fpn: int = STUDENT_FPN) -> CfgNode:
    """The config of a small detector, without any key of ours."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(KINDS[kind]))
    cfg.merge_from_list([*small_opts(fpn=fpn), *opts])
    return cfg


def full_config() -> CfgNode:
    """Detectron2's defaults, ours and those of the projects."""
    cfg = get_cfg()
    add_distill_config(cfg)
    add_project_configs(cfg)
    return cfg


def distilled_config(
    student: str,
    teacher: str,
    weights: Path | str,
    *opts: Any,
    teacher_opts: Iterable[Any] = (),
) -> CfgNode:
    """The config of a small student with a small teacher.

    Args:
        student, teacher: kinds.
        weights: of the teacher, made from ``stock_config(teacher, fpn=TEACHER_FPN)``.
        opts: overrides of the student's config.
        teacher_opts: further ones of the teacher's.
    """
    cfg = full_config()
    cfg.merge_from_file(model_zoo.get_config_file(KINDS[student]))
    cfg.merge_from_list(small_opts())
    distill = cfg.MODEL.DISTILL
    distill.STUDENT_META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "DistilledDetector"
    distill.TEACHER.NAME = KINDS[teacher]
    distill.TEACHER.WEIGHTS = str(weights)
    distill.TEACHER.OPTS = [*small_opts(fpn=TEACHER_FPN), *teacher_opts]
    cfg.merge_from_list(list(opts))
    return cfg


def build(cfg: CfgNode, *, seed: int = 0) -> nn.Module:
    """A model whose random weights depend only on the seed."""
    torch.manual_seed(seed)
    return build_model(cfg)


def build_fcos(*, fpn: int = STUDENT_FPN, seed: int = 0) -> FCOS:
    """A small FCOS, which has no YAML config, on the backbone of a small RetinaNet."""
    return FCOS(
        backbone=build(stock_config("retinanet", fpn=fpn), seed=seed).backbone,
        head=FCOSHead(
            input_shape=[ShapeSpec(channels=fpn)] * 5,
            conv_dims=[fpn] * 2,
            num_classes=5,
            norm="GN",
        ),
        num_classes=5,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[57.0] * 3,
    )


def save_weights(cfg: CfgNode, path: Path, *, seed: int = 1) -> Path:
    """Save a random detector as Detectron2 would; running statistics as after some training."""
    model = build(cfg, seed=seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.8, 1.25)
    torch.save({"model": model.state_dict()}, path)
    return path


def make_batch(
    sizes: Iterable[tuple[int, int]] = ((96, 128), (64, 96)), *, seed: int = 0
) -> list[dict[str, Any]]:
    """Images of noise, one box with its mask in each, by (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 56.0, 56.0]]))
        instances.gt_classes = torch.tensor([1])
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, 8:56, 8:56] = True
        instances.gt_masks = BitMasks(mask)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def train_losses(
    model: nn.Module, batch: list[dict[str, Any]] | None = None, *, seed: int = 3
) -> dict[str, torch.Tensor]:
    """The losses of a model in training mode; the proposals drawn depend only on the seed."""
    model.train()
    torch.manual_seed(seed)
    with EventStorage(0):
        return model(make_batch() if batch is None else batch)


@contextmanager
def bfloat16_without_onednn() -> Iterator[None]:
    """Run what trains in bfloat16 on a CPU without oneDNN.

    Its bfloat16 convolutions are wrong at times on processors with AVX-512 for maps of a cell or
    two (pytorch#163347), which the upper levels of small test images are.
    """
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each parameter that has one, by its name."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
