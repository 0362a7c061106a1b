#!/usr/bin/env python
"""train_net.py whose VFM teacher first learns, in a minute, which digit each of its patches shows.

No weights of a vision foundation model can be had without a network. This small ViT stands in for
one: it is trained on the images and boxes that the student gets, so it knows nothing else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import timm
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn
from torch.nn import functional as F

from ssim_kd.data.digits import register_digits
from ssim_kd.engine import argument_parser, load_config, run
from ssim_kd.projects import add_project_configs
from ssim_kd.projects.vfm.vit import PatchTokens

ITERATIONS, BATCH, RATE = 400, 16, 2e-3


def patch_labels(
    annotations: Sequence[Mapping[str, Any]], cells: int, stride: int, background: int
) -> torch.Tensor:
    """The class of the smallest box that holds a patch's centre, else the background's.

    Args:
        annotations: of one image, in Detectron2's format; boxes are XYWH, in pixels.
        cells: patches a side.
        stride: of the patches, in pixels.
        background: the label of patches in no box.

    Returns:
        (cells, cells) classes.
    """
    labels = torch.full((cells, cells), background)
    centres = (torch.arange(cells) + 0.5) * stride
    # The smallest box comes last, over the others.
    for box in sorted(annotations, key=lambda box: -box["bbox"][2] * box["bbox"][3]):
        x, y, width, height = box["bbox"]
        inside_x = (centres >= x) & (centres < x + width)
        inside_y = (centres >= y) & (centres < y + height)
        labels[inside_y[:, None] & inside_x] = box["category_id"]
    return labels


def train_vit(cfg: CfgNode, iterations: int = ITERATIONS) -> tuple[nn.Module, float]:
    """The ViT of ``MODEL.DISTILL.VFM``, trained on ``DATASETS.TRAIN`` from random weights.

    Returns:
        the model of timm, and the mean loss of the last tenth of the training.
    """
    node, classes = cfg.MODEL.DISTILL.VFM, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    torch.manual_seed(cfg.SEED)
    options = dict(zip(node.OPTS[::2], node.OPTS[1::2], strict=True))
    vit = timm.create_model(node.NAME, num_classes=0, dynamic_img_size=True, **options)
    head = nn.Conv2d(vit.embed_dim, classes + 1, 1)
    tokens_of = PatchTokens(vit)
    stride = vit.patch_embed.patch_size[0]
    mean, std = (torch.tensor(vit.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))

    register_digits(cfg)
    entries = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    images = [torch.from_numpy(cv2.imread(e["file_name"])[:, :, ::-1].copy()) for e in entries]
    labels = torch.stack(
        [
            patch_labels(e["annotations"], image.shape[0] // stride, stride, classes)
            for e, image in zip(entries, images, strict=True)
        ]
    )
    pixels = torch.stack(images).permute(0, 3, 1, 2)

    optimizer = torch.optim.AdamW(
        [*vit.parameters(), *head.parameters()], lr=RATE, weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=iterations)
    losses = []
    for _ in range(iterations):
        chosen = torch.randint(len(pixels), (BATCH,))
        (tokens,) = tokens_of((pixels[chosen] / 255 - mean) / std)
        loss = F.cross_entropy(head(tokens), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, iterations // 10) :]
    return vit, sum(last) / len(last)


def main() -> None:
    """Train the ViT, if that is not done, and then the student."""
    args = argument_parser().parse_args()
    cfg = load_config(args, add_project_configs)
    file = Path(cfg.OUTPUT_DIR) / "vit.pth"
    if not file.is_file():
        vit, loss = train_vit(cfg)
        print(f"The ViT's cross entropy a patch is {loss:.3f} at the end.", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vit.state_dict(), file)
    args.opts += ["MODEL.DISTILL.VFM.WEIGHTS", str(file)]
    run(args, add_project_configs)


if __name__ == "__main__":
    main()
