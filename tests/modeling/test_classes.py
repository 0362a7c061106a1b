"""How many classes a built detector predicts."""

from __future__ import annotations

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from torch import nn

from ssim_kd.modeling import DistilledDetector
from ssim_kd.modeling.classes import num_classes
from tests.helpers import stock_config

KEYS = ("MODEL.ROI_HEADS.NUM_CLASSES", 7, "MODEL.RETINANET.NUM_CLASSES", 7)


@pytest.mark.parametrize("kind", ["faster", "cascade", "mask", "retinanet", "c4"])
def test_num_classes_of_stock_detectors(kind) -> None:
    model = build_model(stock_config(kind, *KEYS))
    assert num_classes(model) == num_classes(DistilledDetector(student=model)) == 7
    assert num_classes(torch.compile(model)) == 7


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("PanopticFPN", 7), ("SemanticSegmentor", None), ("ProposalNetwork", None)],
)
def test_num_classes_of_things_only(arch, expected) -> None:
    opts = ("MODEL.META_ARCHITECTURE", arch, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5)
    assert num_classes(build_model(stock_config("mask", *KEYS, *opts))) == expected


def test_num_classes_of_a_lazy_config() -> None:
    config = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    config.num_classes = 7
    assert num_classes(instantiate(config)) == 7


class Custom(nn.Module):
    """A meta-architecture of the user's: its parts say how many."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(1, count) for count in counts)
        for head, count in zip(self.heads, counts, strict=True):
            head.num_classes = count


@pytest.mark.parametrize(("counts", "expected"), [((2,), 2), ((2, 2), 2), ((2, 3), None)])
def test_num_classes_of_a_custom_detector(counts, expected) -> None:
    assert num_classes(Custom(*counts)) == expected
