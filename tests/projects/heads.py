"""What every method that compares heads must hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes
from torch import nn
from torch.utils._pytree import tree_map

from ssim_kd.modeling import DistilledDetector
from tests.helpers import bfloat16_without_onednn, gradients, make_batch, train_losses
from tests.projects.method import Method, detector, distilled, teacher_of


def hard_batches() -> dict[str, list[Any]]:
    """The last levels of these images are of 1 x 1 cells."""
    sizes = ((64, 96), (48, 64))
    batches = {name: make_batch(sizes) for name in ("one", "half", "none", "flat")}
    for name in ("half", "none"):
        batches[name][0]["instances"] = batches[name][0]["instances"][[]]
    batches["flat"][1]["instances"].gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 8.0, 30.0]]))
    return {k: v[:1] if k in ("one", "none") else v for k, v in batches.items()}


def single(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


class MethodOfHeads(Method):
    """On small detectors."""

    #: The detectors that it serves.
    kinds: Sequence[str] = ()
    #: What it refuses: student, teacher, words of the message.
    refused: Sequence[tuple[Any, Any, Sequence[str]]] = ()
    #: Where the gradient arrives, and where it does not, by the start of the names.
    reaches: Sequence[str] = ()
    spares: Sequence[str] = ("proposal_generator.", "roi_heads.mask_")
    #: Detectors that cost nothing as their own teachers.
    at_rest: Sequence[str] = ()
    #: Whether the gradient there is rounding, divided by a small deviation.
    steep = False
    #: Of the loss of half as precise outputs.
    rounding = 1e-5
    of_heads = True

    def model(self, kind: str, *opts: Any) -> DistilledDetector:
        """Student and teacher of other widths."""
        return distilled(
            detector(kind, *opts), teacher_of(kind, *opts), self.method(**self.options)
        )

    def test_gradients_are_finite_and_only_where_they_belong(self) -> None:
        for kind in self.kinds:
            model, reached = self.model(kind), set[str]()
            (distiller,) = model.distillers.values()
            weights = distiller.scalar_weights
            for part in weights:
                distiller.scalar_weights = {k: v * (k == part) for k, v in weights.items()}
                model.zero_grad()
                train_losses(model)["loss_distill"].backward()
                found = {name for name, g in gradients(model.student).items() if g.any()}
                # What boxes cost is no matter of the classes, and the reverse.
                others = {"cls": "bbox_", "box": "cls_"}.get(part, "no layer")
                assert not [name for name in found if others in name]
                reached |= found
            for start in ("backbone.fpn_output", *self.reaches):
                assert any(name.startswith(start) for name in reached), start
            assert not [name for name in reached if name.startswith(tuple(self.spares))]

    @pytest.mark.parametrize("case", list(hard_batches()))
    def test_it_survives(self, case) -> None:
        """One image, an image or all without boxes, a box without area; in half precision."""
        model, calls = self.model(self.kinds[0]), []
        (distiller,) = model.distillers.values()
        distiller.register_forward_hook(lambda _, *call: calls.append(call))
        with bfloat16_without_onednn(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = train_losses(model, hard_batches()[case])["loss_distill"]
        assert torch.isfinite(loss) and loss > 0 and loss.dtype == torch.float32
        loss.backward()
        assert all(torch.isfinite(g).all() for g in gradients(model).values())
        # Half as precise are the outputs that are compared, not what is computed of them.
        ((student, teacher, batch), (found, _)) = calls[0]
        expected, _ = distiller(*tree_map(single, (student, teacher)), batch)
        torch.testing.assert_close(found, expected, rtol=self.rounding, atol=1e-7)

    def test_a_teacher_that_is_the_student_is_the_least(self) -> None:
        for kind in self.at_rest:
            # The teacher's norms are in evaluation mode.
            student = FrozenBatchNorm2d.convert_frozen_batchnorm(detector(kind))
            if hasattr(student, "head"):
                # Untrained ones predict boxes without area, of which even equal ones have no IoU.
                nn.init.normal_(student.head.bbox_pred.weight, std=1e-4)
                nn.init.constant_(student.head.bbox_pred.bias, 1.0)
            model = distilled(student, copy.deepcopy(student), self.method(**self.options))
            loss = train_losses(model)["loss_distill"]
            loss.backward()
            assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
            assert self.steep or all(
                float(g.abs().max()) < 1e-3 for g in gradients(model.student).values()
            )

    def test_a_pair_that_does_not_fit_is_refused(self) -> None:
        for student, teacher, words in self.refused:
            pair = [([x] if isinstance(x, str) else x) for x in (student, teacher)]
            with pytest.raises(ValueError) as caught:
                distilled(detector(*pair[0]), teacher_of(*pair[1]), self.method(**self.options))
            assert all(word in str(caught.value) for word in words), str(caught.value)

    def test_other_classes_are_refused(self) -> None:
        key = {"faster": "MODEL.ROI_HEADS", "retinanet": "MODEL.RETINANET"}[self.kinds[0]]
        teacher = teacher_of(self.kinds[0], f"{key}.NUM_CLASSES", 7)
        with pytest.raises(ValueError, match="5 classes and the teacher 7"):
            distilled(detector(self.kinds[0]), teacher, self.method(**self.options))
