"""The training batch that distillers see."""

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn


class DistillBatch:
    """A training batch as distillers see it.

    Attributes:
        image_sizes: (height, width) of each image in pixels, without padding.
        images: as the student is given them, (3, H, W) in [0, 255], on the device.
        device: of the features.
        iteration: of the training, from 0.
        max_iter: number of iterations of the training.
        teacher: the frozen detector, heads included, or None if no distiller asked for heads. Its
            heads are float32.
        student: the student.
    """

    def __init__(
        self,
        image_sizes: Sequence[tuple[int, int]],
        instances: Sequence[Instances] | None = None,
        *,
        images: Sequence[torch.Tensor] = (),
        device: torch.device | str = "cpu",
        iteration: int = 0,
        max_iter: int = 1,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
    ) -> None:
        self.image_sizes = list(image_sizes)
        self.images = list(images)
        self.device = torch.device(device)
        self.iteration, self.max_iter = iteration, max_iter
        self.teacher, self.student = teacher, student
        self._instances = instances

    @classmethod
    def from_inputs(
        cls, batched_inputs: Sequence[Mapping[str, Any]], **kwargs: Any
    ) -> "DistillBatch":
        """Read sizes and ground truth off the inputs of a Detectron2 model."""
        sizes = [(int(x["image"].shape[-2]), int(x["image"].shape[-1])) for x in batched_inputs]
        labelled = all("instances" in x for x in batched_inputs)
        return cls(sizes, [x["instances"] for x in batched_inputs] if labelled else None, **kwargs)

    @cached_property
    def instances(self) -> list[Instances] | None:
        """The ground truth of each image, on the device; None if the data has none."""
        if self._instances is None:
            return None
        return [x.to(self.device) for x in self._instances]

    def ground_truth(self, method: str) -> list[Instances]:
        """:attr:`instances`, for a method that needs them.

        Raises:
            ValueError: the data has none.
        """
        if self.instances is None:
            raise ValueError(
                f"{method} needs the ground truth, but the training images have no 'instances'. "
                "Use a mapper that keeps them, or a method that needs none."
            )
        return self.instances

    def boxes(self, method: str) -> list[torch.Tensor]:
        """The ground-truth boxes of each image, (R, 4) in pixels; as :meth:`ground_truth`."""
        return [x.gt_boxes.tensor for x in self.ground_truth(method)]

    def generator(self, *names: str) -> torch.Generator:
        """What a method draws its random numbers with, on the device of the features.

        It depends only on the seed of the process, the iteration and the names: a resumed training
        draws the same, and the random numbers that the student trains with stay as they are.

        Args:
            names: what tells the generators of a step apart.
        """
        text = " ".join([str(torch.initial_seed()), str(self.iteration), *names])
        return torch.Generator(self.device).manual_seed(zlib.crc32(text.encode()))

    def is_padded(self, height: int, width: int, stride: int) -> bool:
        """Whether any cell of a map lies wholly in the padding of its image."""
        return any(-(-h // stride) < height or -(-w // stride) < width for h, w in self.image_sizes)

    def valid_mask(self, height: int, width: int, stride: int) -> torch.Tensor:
        """Which cells of a map see any pixel of their image.

        Args:
            height, width: size of the map in cells.
            stride: of the map, in input pixels.

        Returns:
            (N, H, W) bool, False for the cells that lie wholly in the padding.
        """
        if not self.is_padded(height, width, stride):
            size = (len(self.image_sizes), height, width)
            return torch.ones(size, dtype=torch.bool, device=self.device)
        sizes = -(-self._sizes_on_device // stride)
        rows = torch.arange(height, device=self.device) < sizes[:, :1]
        columns = torch.arange(width, device=self.device) < sizes[:, 1:]
        return rows[:, :, None] & columns[:, None, :]

    @cached_property
    def _sizes_on_device(self) -> torch.Tensor:
        """(N, 2) int64. Copied once a batch, from pinned memory so that the host need not wait."""
        sizes = torch.tensor(self.image_sizes)
        if self.device.type == "cuda":
            sizes = sizes.pin_memory()
        return sizes.to(self.device, non_blocking=True)
