"""What a distiller may know of a batch beside the features."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances


@dataclass
class DistillBatch:
    """A training batch as distillers see it.

    Attributes:
        image_sizes: (height, width) of each image in pixels, without padding.
        instances: the ground truth of each image, or None where the data has none.
        device: where the features are.
    """

    image_sizes: list[tuple[int, int]]
    instances: list[Instances] | None
    device: torch.device

    def __post_init__(self) -> None:
        self._sizes: torch.Tensor | None = None

    @classmethod
    def from_inputs(
        cls, batched_inputs: list[dict[str, Any]], device: torch.device
    ) -> "DistillBatch":
        """Read the batch off the inputs of a Detectron2 model."""
        sizes = [(int(x["image"].shape[-2]), int(x["image"].shape[-1])) for x in batched_inputs]
        instances = None
        if all("instances" in x for x in batched_inputs):
            instances = [x["instances"] for x in batched_inputs]
        return cls(sizes, instances, device)

    def valid_mask(self, height: int, width: int, stride: int) -> torch.Tensor | None:
        """Which cells of a map see any pixel of their image.

        Args:
            height, width: size of the map in cells.
            stride: of the map, in input pixels.

        Returns:
            (N, H, W) bool, False for the cells that lie wholly in the padding; None where every
            cell is valid.
        """
        if all(-(-h // stride) >= height and -(-w // stride) >= width for h, w in self.image_sizes):
            return None
        sizes = -(-self._sizes_on_device() // stride)
        rows = torch.arange(height, device=self.device) < sizes[:, :1]
        columns = torch.arange(width, device=self.device) < sizes[:, 1:]
        return rows[:, :, None] & columns[:, None, :]

    def _sizes_on_device(self) -> torch.Tensor:
        """(N, 2) int64. Copied once a batch, from pinned memory so that the host need not wait."""
        if self._sizes is None:
            sizes = torch.tensor(self.image_sizes)
            if self.device.type == "cuda":
                sizes = sizes.pin_memory()
            self._sizes = sizes.to(self.device, non_blocking=True)
        return self._sizes
