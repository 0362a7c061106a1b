"""Losses that are sums, at a batch and image size other than the one their weights belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class ReferenceSize(NamedTuple):
    """The batch that the published weights of a summed loss belong to.

    A sum over images, channels or cells grows with their number, and with it the weight that suits.
    A method multiplies its sum by the reference's number over its own, so that the published weight
    keeps its meaning.

    Attributes:
        images: on one GPU.
        height, width: of the padded images in pixels.
        channels: of the teacher's maps.

    Example:
        >>> published = ReferenceSize(2, 800, 1088, 256)
        >>> published.cells(stride=16)
        3400
    """

    images: int
    height: int
    width: int
    channels: int

    def cells(self, stride: int) -> int:
        """Number of cells of a map."""
        return math.ceil(self.height / stride) * math.ceil(self.width / stride)


def reference_size(key: str, values: Sequence[int]) -> ReferenceSize | None:
    """The reference of a config key: [images, height, width, channels], or [] for none.

    Raises:
        ValueError: other than none or four positive numbers.
    """
    if not len(values):
        return None
    whole = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
    if len(values) != 4 or not whole:
        raise ValueError(
            f"{key} is {list(values)}; expected [] or [images, height, width, channels], whole "
            "numbers > 0, such as [2, 800, 1088, 256]."
        )
    return ReferenceSize(*values)


def size_scales(
    reference: ReferenceSize | None, maps: torch.Tensor, mask: torch.Tensor | None, stride: int
) -> tuple[float, float, torch.Tensor | float]:
    """What sums are multiplied by, so that they are as great as at the reference.

    Args:
        reference: None for the sums as they are.
        maps: the teacher's, (N, C, H, W).
        mask: bool, which of the N H W cells count; None: all.
        stride: of the maps in pixels.

    Returns:
        factors of sums over images, over channels and over the cells of an image: each the
        reference's number over the maps'.
    """
    if reference is None:
        return 1.0, 1.0, 1.0
    n, channels, height, width = maps.shape
    # A tensor also without a mask: the same bits as with one that is True everywhere.
    cells = maps.new_full((), height * width) if mask is None else mask.sum() / n
    return reference.images / n, reference.channels / channels, reference.cells(stride) / cells


def norm_scales(
    reference: ReferenceSize | None, maps: torch.Tensor, mask: torch.Tensor | None, stride: int
) -> tuple[float, float, torch.Tensor | float]:
    """As :func:`size_scales` for l2 norms: the roots of the factors of sums."""
    images, channels, cells = size_scales(reference, maps, mask, stride)
    return images**0.5, channels**0.5, cells**0.5
