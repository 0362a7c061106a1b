"""What every method that compares maps must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ssim_kd.modeling import DistillBatch
from tests.helpers import bfloat16_without_onednn
from tests.level_maps import STRIDES, batch_of, bind, frozen, pyramid, random_parameters
from tests.projects.float64 import convolved, number
from tests.projects.method import Method, detector

# An image with a box, one without area and one of a single pixel; one without any.
BOXES = [[[3.0, 4.0, 50.0, 40.0], [9.0, 9.0, 9.0, 30.0], [60.0, 60.0, 61.0, 61.0]], []]
PAIR = [[4.0, 4.0, 30.0, 26.0], [2.0, 3.0, 20.0, 18.0]]


class MethodOfMaps(Method):
    """As they are, on maps that are padded, tiny, few, half as precise, or without boxes."""

    #: Equal maps of equal width cost nothing, without a module being trained for it.
    at_rest = False
    #: The loss of a batch is the mean of its halves', so that two processes are one.
    is_mean = False
    #: A padded map is the cropped one. Other methods convolve, or mirror, beyond the image.
    crops = False
    #: It needs boxes; without them it does not reach the student.
    needs_boxes = asks = False
    #: By which the tests weight the four levels.
    level_weights: Sequence[float] = (0.5, 1.0, 2.0, 3.0)
    #: It computes in single precision, whatever the training's is.
    single = True
    #: Between what its weighted loss is at the published size, see the test.
    size = (1, 100)
    #: By what a reference scales each part, or between what; see the test.
    growth: Mapping[str, Any] = {}

    def formula(
        self,
        distiller: Any,
        student: dict[str, np.ndarray],
        teacher: dict[str, np.ndarray],
        batch: DistillBatch,
    ) -> dict[str, float]:
        """The scalars, of the adapted maps (N, C, H, W): those of :meth:`level_formula`."""
        found: dict[str, float] = {}
        for level, stride in STRIDES.items():
            sizes = [(-(-h // stride), -(-w // stride)) for h, w in batch.image_sizes]
            pair = [
                [x[:, :h, :w] for x, (h, w) in zip(maps[level], sizes, strict=True)]
                for maps in (student, teacher)
            ]
            value = self.level_formula(distiller, level, *pair, batch)
            parts = value if isinstance(value, dict) else {"": value}
            found |= {f"{level}_{part}".rstrip("_"): float(v) for part, v in parts.items()}
        return found

    def level_formula(
        self,
        distiller: Any,
        level: str,
        student: list[np.ndarray],
        teacher: list[np.ndarray],
        batch: DistillBatch,
    ) -> Any:
        """A number, or one by part, of the maps (C, H, W) of each image without its padding."""
        raise NotImplementedError

    def test_by_hand(self) -> None:
        """A value that can be followed with a pencil."""
        raise NotImplementedError

    def make(self, student: int = 3, teacher: int = 4, **options: Any) -> Any:
        """A bound distiller of two widths."""
        own = {"levels": list(STRIDES), "level_weights": self.level_weights, **self.options}
        return bind(self.method(**{**own, **options}), student, teacher, STRIDES)

    def maps(self, size: tuple[int, int], n: int = 2, student: int = 3) -> tuple[dict, dict]:
        """The student's with gradients, and the teacher's, for images of this size."""
        return pyramid(student, size, n), frozen(pyramid(4, size, n))

    @pytest.mark.parametrize("size", [(48, 64), (33, 40)], ids=["full", "padded"])
    def test_the_formula_in_float64(self, size) -> None:
        distiller = random_parameters(self.make())
        batch = batch_of([BOXES[0][:2], PAIR], (48, 64), iteration=5)
        batch.image_sizes[1] = size
        student, teacher = (frozen(x) for x in self.maps((48, 64)))
        for level, stride in STRIDES.items():
            padding = ~batch.valid_mask(*student[level].shape[-2:], stride)[:, None]
            # A convolution of the student's map may see zeros beyond the image.
            student[level].masked_fill_(padding, 1e3 if self.crops else 0.0)
            teacher[level].masked_fill_(padding, 1e3)
        _, found = distiller(student, teacher, batch)
        student, teacher = ({k: number(v) for k, v in x.items()} for x in (student, teacher))
        for level, adapter in distiller.adapters.items():
            student[level] = np.stack([convolved(adapter, x) for x in student[level]])
        expected = self.formula(distiller, student, teacher, batch)
        assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, 1e-4, 1e-6)

    @pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("size", "boxes"),
        [((128, 160), BOXES), ((64, 64), [[]]), ((64, 64), BOXES[:1]), ((64, 64), [[], []])],
        ids=["padded", "one-image-without-boxes", "one-image", "no-boxes"],
    )
    def test_gradients_are_finite_and_only_where_they_belong(self, half, size, boxes) -> None:
        """The smaller images have maps of 1 x 1 cells."""
        distiller, (student, teacher) = self.make(), self.maps(size, len(boxes))
        batch = batch_of(boxes, size)
        if size == (128, 160):
            batch.image_sizes[1] = (100, 90)
        with bfloat16_without_onednn(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            total, scalars = distiller(student, teacher, batch)
        total.backward()
        assert total.dtype == torch.float32 and torch.isfinite(total) and total > 0
        assert scalars and not any(value.requires_grad for value in scalars.values())
        weighted = sum(value * distiller.scalar_weights[key] for key, value in scalars.items())
        torch.testing.assert_close(weighted, total.detach())
        assert student["p3"].grad.any() != (self.asks and not boxes[0])
        assert all(torch.isfinite(value.grad).all() for value in student.values())
        for own, p in distiller.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all(), own

    def test_half_precision_is_taken_to_single(self) -> None:
        if not self.single:
            return
        distiller, maps = self.make(4), self.maps((64, 96), student=4)
        halves = [{k: v.detach().bfloat16() for k, v in x.items()} for x in maps]
        batch = batch_of(BOXES, (64, 96))
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = distiller(*halves, batch)
        expected, _ = distiller(*({k: v.float() for k, v in x.items()} for x in halves), batch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def rest(self, distiller: Any) -> None:
        """Give the modules of a distiller the values with which equal maps cost nothing."""

    def test_equal_maps_cost_nothing(self) -> None:
        if not self.at_rest:
            return
        distiller, (student, _) = self.make(4), self.maps((48, 64), student=4)
        self.rest(distiller)
        total, scalars = distiller(student, frozen(student), batch_of(BOXES, (48, 64)))
        total.backward()
        reaching = {k: v for k, v in scalars.items() if k not in ("real", "sides")}
        assert sum(map(float, reaching.values())) == pytest.approx(0, abs=1e-5)
        # The gradient of a norm, and of l1, is not 0 there.
        assert all(torch.isfinite(v.grad).all() for v in student.values())
        if self.is_mean and self.method.__name__ != "L1Distiller":
            assert max(float(v.grad.abs().max()) for v in student.values()) < 1e-5

    def test_two_processes_are_one(self) -> None:
        if not self.is_mean:
            return
        distiller, size = self.make(), (64, 96)
        student, teacher = self.maps(size)
        whole = batch_of(BOXES, size)
        whole.image_sizes[1] = (40, 60)
        halves = []
        for i in (0, 1):
            batch = batch_of(BOXES[i : i + 1], size)
            batch.image_sizes = whole.image_sizes[i : i + 1]
            maps = ({k: v[i : i + 1] for k, v in side.items()} for side in (student, teacher))
            halves.append(distiller(*maps, batch)[0])
        torch.testing.assert_close(sum(halves) / 2, distiller(student, teacher, whole)[0])

    def test_masked_is_cropped(self) -> None:
        if not self.crops:
            return
        distiller, boxes = self.make(), [BOXES[0][:1]] * 2
        student, teacher = self.maps((128, 192))
        found, _ = distiller(student, teacher, batch_of(boxes, (64, 128)))
        cropped = (
            {k: v[..., : -(-64 // STRIDES[k]), : -(-128 // STRIDES[k])] for k, v in maps.items()}
            for maps in (student, teacher)
        )
        expected, _ = distiller(*cropped, batch_of(boxes, (64, 128)))
        torch.testing.assert_close(found, expected)

    def test_training_images_without_ground_truth(self) -> None:
        if not self.needs_boxes:
            return
        name = self.method.__name__
        with pytest.raises(ValueError, match=f"{name} needs the ground truth") as caught:
            self.make()(*self.maps((64, 64), 1), DistillBatch([(64, 64)]))
        assert "'instances'" in str(caught.value)

    def test_a_reference_scales_sums(self) -> None:
        """From 2 images of 48 x 64 pixels, 4 channels, to 4 images of 96 x 128, 12 channels."""
        if not self.growth:
            return
        plain, scaled = self.make(), self.make(reference=[4, 96, 128, 12])
        scaled.load_state_dict(plain.state_dict())
        maps, batch = self.maps((48, 64)), batch_of([PAIR] * 2, (48, 64))
        before, after = (d(*maps, batch)[1] for d in (plain, scaled))
        for part, factor in self.growth.items():
            found = float(after[f"p3_{part}".rstrip("_")] / before[f"p3_{part}".rstrip("_")])
            least, most = factor if isinstance(factor, tuple) else (factor, factor)
            assert least * (1 - 1e-5) < found < most * (1 + 1e-5), part
        # What the teacher has in the padding counts as little.
        batch.image_sizes[1] = (33, 40)
        masks = {k: batch.valid_mask(*v.shape[-2:], STRIDES[k]) for k, v in maps[1].items()}
        other = {k: v.masked_fill(~masks[k][:, None], 1e3) for k, v in maps[1].items()}
        torch.testing.assert_close(*(scaled(maps[0], x, batch)[0] for x in (maps[1], other)))

    @pytest.mark.parametrize("dense", [False, True], ids=["rcnn", "dense"])
    def test_by_its_own_weights_it_is_as_large_as_published_ones_are(self, dense) -> None:
        """Of maps of deviation 1 that have nothing in common."""
        reference = {"reference": [2, 800, 1088, 256]} if self.growth else {}
        distiller = self.method(levels=list(STRIDES), **self.options, **reference)
        distiller.resolve(detector("retinanet") if dense else None)
        bind(distiller, 4, 4, STRIDES)
        maps = self.maps((128, 160), student=4)
        total, scalars = distiller(*maps, batch_of([BOXES[0][:1]] * 2, (128, 160)))
        found = float(total.detach()) * distiller.weight(0.5)
        least, most = self.size
        assert least < found < most, f"the loss is {found} by the own weights; its parts: {scalars}"

    def test_a_resumed_training_has_its_modules(self) -> None:
        distiller, other = self.make(), self.make()
        other.load_state_dict({k: v + 1 for k, v in distiller.state_dict().items()})
        other.load_state_dict(distiller.state_dict())
        ours, theirs = distiller.state_dict(), other.state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        # Nothing of a batch is kept: a second step is that of the resumed one.
        maps = self.maps((64, 96))
        for step in range(2):
            distiller(*maps, batch_of(BOXES, (64, 96), iteration=step))
        other.load_state_dict(distiller.state_dict())
        other.eval(), distiller.eval()
        batch = batch_of(BOXES, (64, 96), iteration=1)
        assert torch.equal(other(*maps, batch)[0], distiller(*maps, batch)[0])
