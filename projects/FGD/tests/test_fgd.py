"""FGD: focal loss in boxes and beyond, attention, and the global relation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ssim_kd.projects.fgd import FGDDistiller
from tests.level_maps import STRIDES, batch_of, bind, maps_of
from tests.projects.float64 import affine, attention, cells, normed, softmax
from tests.projects.maps import MethodOfMaps


def context(block, x: np.ndarray) -> np.ndarray:
    """GC(x) of the cells of an image."""
    pooled = softmax(affine(block.attend, x)[:, 0]) @ x
    first, norm, _, last = block.transform
    return x + affine(last, normed(norm, affine(first, pooled), -1).clip(0))


def foreground(boxes: list[list[float]], height: int, width: int, stride: int) -> np.ndarray:
    """The largest share of a box by cell."""
    found = np.zeros((height, width))
    for x0, y0, x1, y1 in boxes:
        if x0 < x1 and y0 < y1:
            left, top, right, bottom = (
                *(math.floor(v / stride) for v in (x0, y0)),
                *(math.ceil(v / stride) for v in (x1, y1)),
            )
            inside = found[top : bottom + 1, left : right + 1]
            np.maximum(inside, 1 / ((bottom - top + 1) * (right - left + 1)), out=inside)
    return found.ravel()


class TestFGD(MethodOfMaps):
    method = FGDDistiller
    bad = [
        ("part_weights.fg", -1.0, "FGD.FG_WEIGHT"),
        ("part_weights.global", math.nan, "FGD.GLOBAL_WEIGHT"),
        ("temperature", 0.0, "FGD.TEMPERATURE"),
        ("reference", [2, 800], "FGD.REFERENCE"),
    ]
    at_rest = is_mean = crops = needs_boxes = True
    growth = {"fg": 3, "bg": 3, "attention": (3, 4), "global": 3 * 4}

    def test_by_hand(self) -> None:
        # T = 0: attention is 1 everywhere. S = 1 in the box's two cells of four: (1/2 + 1/2) C / 2
        # images; S = 2 in one of the two others: 4 / 2 C / 2.
        student = torch.tensor([1.0, 1.0, 2.0, 0.0]).view(1, 1, 1, 4).expand(2, 3, 1, 4)
        batch = batch_of([[[0.0, 0.0, 7.0, 0.001]], []], (8, 32))
        # The box covers two rows by the formula, of which the map has one.
        distiller = bind(FGDDistiller(), 3)
        found = distiller.level_loss(maps_of(student, torch.zeros(2, 3, 1, 4)), batch)
        assert float(found["fg"]) == pytest.approx(2 * 0.25 * 3 / 2)
        # The other image is all background: (1 + 1 + 4) / 4.
        assert float(found["bg"]) == pytest.approx((4 / 2 + 6 / 4) * 3 / 2)

    def level_formula(self, distiller, level, student, teacher, batch):
        parts, n = dict.fromkeys(("fg", "bg", "attention", "global"), 0.0), len(student)
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            boxes = batch.instances[i].gt_boxes.tensor.tolist()
            weights = foreground(boxes, *s.shape[1:], STRIDES[level])
            s, t = cells(s), cells(t)
            (spatial_s, channel_s), (spatial_t, channel_t) = attention(s, 0.5), attention(t, 0.5)
            error = ((s - t) ** 2 * channel_t).sum(1) * spatial_t
            parts["fg"] += (weights * error).sum() / n
            parts["bg"] += error[weights == 0].sum() / max((weights == 0).sum(), 1) / n
            parts["attention"] += abs(spatial_s - spatial_t).sum() / n
            parts["attention"] += abs(channel_s - channel_t).sum() / n
            ours = context(distiller.student_context[level], s)
            parts["global"] += (
                (ours - context(distiller.teacher_context[level], t)) ** 2
            ).sum() / n
        return parts
