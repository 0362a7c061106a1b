#!/usr/bin/env python
"""Which students learn from which teachers: builds and steps each pair on a CPU, with tiny models.

    python tools/pairs.py                                   # writes docs/pairs.md
    python tools/pairs.py --students fcos --teachers cascade retinanet --output -

A pair that cannot work says so when it is built; the page has its message.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssim_kd.config import add_timm_config
from ssim_kd.modeling import (
    DenseHeadDistiller,
    DistilledDetector,
    Distiller,
    RCNNHeadDistiller,
    SSIMDistiller,
)
from ssim_kd.modeling.external_teacher import rtdetr_teacher

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 5
# Channels of the FPN of a student, and of a teacher.
STUDENT, TEACHER = 32, 64
SIZES = ((96, 128), (128, 96))
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
    "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RETINANET.NUM_CLASSES": CLASSES,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
}


def small_config(name: str, channels: int) -> CfgNode:
    """A config of the model zoo made small."""
    cfg = get_cfg()
    add_timm_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    options = {**SMALL, "MODEL.FPN.OUT_CHANNELS": channels}
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return cfg


def zoo(name: str) -> Callable[[int], nn.Module]:
    """Builds a small copy of a detector of the model zoo."""
    return lambda channels: build_model(small_config(name, channels))


def fcos(channels: int) -> nn.Module:
    """The zoo has it as a LazyConfig; its backbone is RetinaNet's."""
    cfg = small_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", channels)
    backbone = build_backbone(cfg)
    shapes = [ShapeSpec(channels=channels)] * len(backbone.output_shape())
    head = FCOSHead(input_shape=shapes, conv_dims=[64], num_classes=CLASSES, norm="GN")
    pixels = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
    return FCOS(backbone=backbone, head=head, num_classes=CLASSES, **pixels)


def mobilenet(channels: int) -> nn.Module:
    """Faster R-CNN on a MobileNetV3 of timm."""
    cfg = small_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", channels)
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM = "mobilenetv3_small_050", "BN"
    return build_model(cfg)


def vitdet(channels: int) -> nn.Module:
    """Faster R-CNN on a plain ViT: RGB images, square padding, LayerNorm. Detectron2 main only."""
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT

    net = ViT(
        img_size=128,
        embed_dim=32,
        depth=2,
        num_heads=2,
        window_size=4,
        window_block_indexes=[0],
        use_rel_pos=True,
        out_feature="last_feat",
    )
    cfg = small_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", channels)
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    parts = architecture.from_config(cfg)
    parts["backbone"] = SimpleFeaturePyramid(
        net,
        in_feature="last_feat",
        out_channels=channels,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        square_pad=128,
    )
    parts["input_format"] = "RGB"
    return architecture(**parts)


def rtdetr(channels: int) -> nn.Module:
    """The hybrid encoder of an RT-DETR of transformers."""
    import transformers

    config_of: Any = transformers.RTDetrResNetConfig
    backbone = config_of(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config: Any = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=channels,
        encoder_attention_heads=2,
        decoder_in_channels=[channels] * 3,
        d_model=channels,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_queries=5,
        num_denoising=0,
    )
    model: Any = transformers.RTDetrForObjectDetection(config)
    for parameter in model.parameters():  # its own start makes the maps nearly 0
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return rtdetr_teacher(model)


DETECTORS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "faster": ("Faster R-CNN FPN", zoo("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")),
    "mask": ("Mask R-CNN FPN", zoo("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")),
    "cascade": ("Cascade Mask R-CNN", zoo("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml")),
    "keypoint": ("Keypoint R-CNN", zoo("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")),
    "panoptic": ("Panoptic FPN", zoo("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")),
    "retinanet": ("RetinaNet", zoo("COCO-Detection/retinanet_R_50_FPN_1x.yaml")),
    "fcos": ("FCOS", fcos),
    "c4": ("Faster R-CNN C4", zoo("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")),
    "dc5": ("Faster R-CNN DC5", zoo("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml")),
    "mobilenet": ("Faster R-CNN FPN, MobileNetV3 (timm)", mobilenet),
    "vitdet": ("Faster R-CNN, ViTDet", vitdet),
    "rtdetr": ("RT-DETR", rtdetr),
}
# What a detector needs in addition to Detectron2 0.6.
NEEDS = {
    "mobilenet": "timm",
    "vitdet": "detectron2.modeling.backbone.vit",
    "rtdetr": "transformers",
}
TEACHERS = tuple(DETECTORS)
STUDENTS = tuple(name for name in DETECTORS if name != "rtdetr")
DISTILLERS: dict[str, tuple[str, Callable[[], Distiller]]] = {
    "features": ("Feature maps (SSIM; any method that compares maps)", SSIMDistiller),
    "rcnn_head": (
        "Head outputs of R-CNN (`RCNNHeadDistiller`)",
        lambda: RCNNHeadDistiller(name="head"),
    ),
    "dense_head": (
        "Head outputs of dense detectors (`DenseHeadDistiller`)",
        lambda: DenseHeadDistiller(name="head"),
    ),
}


def batch() -> list[dict[str, Any]]:
    """Two images of noise of unlike sizes, with boxes, masks, keypoints and segments."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for height, width in SIZES:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 72.0, 72.0]]))
        instances.gt_classes = torch.tensor([0])
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, 8:72, 8:72] = True
        instances.gt_masks = BitMasks(mask)
        points = torch.rand(1, 17, 2, generator=generator) * 60 + 10
        instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((1, 17, 1), 2.0)], 2))
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        segments = torch.randint(0, 4, (height, width), generator=generator)
        found.append({"image": image, "instances": instances, "sem_seg": segments})
    return found


def step(student: str, teacher: str, distiller: str = "features") -> str:
    """Build a pair, and train one step.

    Returns:
        the levels that are compared, "p2-p6"; or "yes" for a distiller of head outputs.

    Raises:
        ValueError: the pair cannot work; says why.
        RuntimeError: it was built, but its step is wrong.
    """
    torch.manual_seed(0)
    term = DISTILLERS[distiller][1]()
    model = DistilledDetector(
        student=DETECTORS[student][1](STUDENT),
        teacher=DETECTORS[teacher][1](TEACHER),
        distillers=[term],
    ).train()
    with EventStorage():
        losses = model(batch())
    sum(losses.values()).backward()
    if not all(torch.isfinite(loss) for loss in losses.values()) or losses["loss_distill"] <= 0:
        raise RuntimeError(f"{student} <- {teacher}: the losses are {losses}.")
    reached = [p for p in model.student.parameters() if p.grad is not None]
    if not reached or not all(torch.isfinite(p.grad).all() for p in reached):
        raise RuntimeError(f"{student} <- {teacher}: the gradient is missing or not finite.")
    return levels_in_words(getattr(term, "levels", []))


def levels_in_words(levels: Sequence[str]) -> str:
    """p2-p6 for p2, p3, p4, p5, p6."""
    if not levels:
        return "yes"
    numbers = [int(level.lstrip("pres")) for level in levels]
    if len(levels) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{levels[0]}-{levels[-1]}"
    return ", ".join(levels)


def table(students: Sequence[str], teachers: Sequence[str], distiller: str) -> str:
    """The table of a distiller in Markdown: a row a student, a column a teacher, with reasons."""
    reasons = []
    rows = [
        "| student \\ teacher | " + " | ".join(DETECTORS[t][0] for t in teachers) + " |",
        "|---" * (len(teachers) + 1) + "|",
    ]
    without = []
    for student in students:
        cells = []
        for teacher in teachers:
            try:
                cells.append(step(student, teacher, distiller))
            except ValueError as error:
                # Without the names of this pair.
                reasons.append(re.split(": |, but ", str(error))[0].strip("."))
                cells.append("no")
        if set(cells) == {"no"}:
            without.append(DETECTORS[student][0])
        else:
            rows.append(f"| {DETECTORS[student][0]} | " + " | ".join(cells) + " |")
    if without:
        rows += ["", f"From no teacher: {', '.join(without)}."]
    if reasons:
        rows += ["", f"no: {'; '.join(dict.fromkeys(reasons))}."]
    return "\n".join(rows)


def available(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of some detectors those that can be built here, and why others cannot, a line each."""
    found, lacking = [], []
    for name in names:
        try:
            DETECTORS[name][1](STUDENT)
            found.append(name)
        except ImportError as error:
            lacking.append(f"{DETECTORS[name][0]}: {error}")
    return found, lacking


def main(argv: Sequence[str] | None = None) -> None:
    """Step the pairs, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=TEACHERS)
    parser.add_argument("--distillers", nargs="+", choices=DISTILLERS, default=tuple(DISTILLERS))
    parser.add_argument("--output", default=str(ROOT / "docs" / "pairs.md"), help="-: print")
    args = parser.parse_args(argv)
    students, lacking = available(args.students)
    teachers, also = available(args.teachers)
    main_only = "vitdet" in [*students, *teachers]
    page = [
        "# Which students learn from which teachers",
        "",
        "Written by `tools/pairs.py`: each pair was built as a tiny model and trained for a step "
        "on a CPU, with",
        f"Detectron2 {'main' if main_only else detectron2.__version__} and PyTorch "
        f"{torch.__version__.split('+')[0]}. A cell names the levels that are compared if "
        "`IN_FEATURES` is [].",
        "Others can be named: below the FPN, a ResNet or a timm backbone has `res2` to `res5`. A "
        "pair that cannot work",
        "says why when it is built.",
    ]
    for name in args.distillers:
        page += ["", f"## {DISTILLERS[name][0]}", "", table(students, teachers, name)]
    for reason in dict.fromkeys([*lacking, *also]):
        page += ["", f"Not built here: {reason}."]
    text = "\n".join(page) + "\n"
    if args.output == "-":
        print(text)
    else:
        Path(args.output).write_text(text)
        print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
