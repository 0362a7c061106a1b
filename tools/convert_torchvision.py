#!/usr/bin/env python
"""Convert an ImageNet ResNet of torchvision into weights that Detectron2 starts from.

    python tools/convert_torchvision.py resnet18 datasets/pretrained/R-18.pkl
    python tools/convert_torchvision.py resnet18.pth datasets/pretrained/R-18.pkl

The first downloads torchvision's weights, the second takes a file of them. The images must then be
RGB, normalised by PIXEL_MEAN [123.675, 116.280, 103.530] and PIXEL_STD [58.395, 57.120, 57.375],
and RESNETS.STRIDE_IN_1X1 be False, as in configs/COCO-Detection/plain_faster_rcnn_R_18_FPN_1x.yaml.
"""

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision


def convert(state_dict: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Rename the tensors of a torchvision ResNet to Detectron2's names, without the classifier.

    Raises:
        ValueError: tensors that are not a ResNet's.
    """
    if "conv1.weight" not in state_dict or "layer4.0.conv1.weight" not in state_dict:
        raise ValueError(
            f"Not a torchvision ResNet: its tensors are {list(state_dict)[:3]}, ...; expected "
            "conv1.weight, ..., layer4.0.conv1.weight."
        )
    converted = {}
    for key, value in state_dict.items():
        if key.startswith("fc.") or key.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        converted[name if name.startswith("res") else f"stem.{name}"] = value.numpy()
    return converted


def main(argv: Sequence[str] | None = None) -> None:
    """Read, convert, write; ``argv`` is the command line's unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a .pth of torchvision, or a name such as resnet18")
    parser.add_argument("target", type=Path, help="the .pkl to write")
    args = parser.parse_args(argv)
    if Path(args.source).is_file():
        state_dict = torch.load(args.source, map_location="cpu", weights_only=True)
    else:
        state_dict = torchvision.models.get_model(args.source, weights="DEFAULT").state_dict()
    tensors = convert(state_dict)
    data = {
        "model": tensors,
        "__author__": "torchvision",
        # Detectron2 then looks for the tensors below whatever prefix the model has.
        "matching_heuristics": True,
    }
    args.target.parent.mkdir(parents=True, exist_ok=True)
    args.target.write_bytes(pickle.dumps(data))
    print(f"{args.target}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
