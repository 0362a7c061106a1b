"""Ground-truth boxes on a level: the cells that they cover, how much each counts, and crops.

Boxes are in pixels and are divided by the stride of the level, not by the image's size: a map
is padded, so its size is not that of one image.

Shapes: N images, R boxes, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ssim_kd.ops.options import compute_dtype


def box_cells(boxes: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The first and last cells of each box: from floor(x0 / stride) to ceil(x1 / stride).

    Both ends are inclusive, as in FGD's code: a box covers one cell more than its pixels do.

    Args:
        boxes: (R, 4), x0, y0, x1, y1 in pixels.
        stride: of the level, in pixels.

    Returns:
        (first, last): (R, 2) each, x and y, whole numbers as floats; they may lie beyond the map.
    """
    return (boxes[:, :2] / stride).floor(), (boxes[:, 2:] / stride).ceil()


def has_area(boxes: Tensor) -> Tensor:
    """Which boxes have a width and a height > 0, (R,) bool.

    Args:
        boxes: (R, 4), x0, y0, x1, y1.
    """
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def covered_cells(boxes: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Which cells of a map each box covers, by :func:`box_cells`.

    Args:
        boxes: (R, 4), x0, y0, x1, y1 in pixels. Boxes without area cover nothing.
        height, width: of the map in cells.
        stride: of the level, in pixels.

    Returns:
        (R, H, W) bool.
    """
    first, last = box_cells(boxes, stride)
    kept = has_area(boxes)
    columns = torch.arange(width, device=boxes.device)
    rows = torch.arange(height, device=boxes.device)
    across = (columns >= first[:, :1]) & (columns <= last[:, :1])
    down = (rows >= first[:, 1:]) & (rows <= last[:, 1:])
    return (down & kept[:, None])[:, :, None] & across[:, None, :]


def foreground_weights(
    boxes: Sequence[Tensor],
    height: int,
    width: int,
    stride: int,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """1 / the area in cells of the smallest box that covers a cell (FGD, eq. 2 and 3).

    So that every object counts the same, whatever its size.

    Args:
        boxes: of each image, (R, 4), x0, y0, x1, y1 in pixels; R may be 0.
        height, width: of the map in cells.
        stride: of the level, in pixels.
        mask: (N, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (N, H, W) float32, 0 outside boxes and in invalid cells.

    Example:
        >>> foreground_weights([torch.tensor([[0.0, 0.0, 8.0, 16.0]])], 2, 3, stride=16)
        tensor([[[0.2500, 0.2500, 0.0000],
                 [0.2500, 0.2500, 0.0000]]])
    """
    planes = []
    for tensor in boxes:
        found = tensor.float()
        first, last = box_cells(found, stride)
        shares = 1 / (last - first + 1).prod(dim=1)
        covered = covered_cells(found, height, width, stride)
        # One plane of zeros more: an image may have no box.
        weights = torch.where(covered, shares[:, None, None], 0.0)
        planes.append(torch.cat([weights.new_zeros(1, height, width), weights]).amax(dim=0))
    stacked = torch.stack(planes)
    return stacked if mask is None else stacked.masked_fill(~mask, 0.0)


def background_weights(foreground: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 / the number of background cells of an image, in each of them (FGD, eq. 4).

    Args:
        foreground: (N, H, W), 0 outside boxes.
        mask: (N, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (N, H, W) float32; the cells of an image sum to 1, or to 0 if boxes cover it all.
    """
    background = foreground == 0
    if mask is not None:
        background = background & mask
    return background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def roi_crops(maps: Tensor, boxes: Sequence[Tensor], stride: int, size: int) -> list[Tensor]:
    """What a map holds in each box, by RoIAlign with pixels' centres at their halves.

    Args:
        maps: (N, C, H, W), floating point.
        boxes: of each image, (R, 4), x0, y0, x1, y1 in pixels; R may be 0. Boxes without area are
            left out.
        stride: of the level, in pixels.
        size: of a crop, in bins a side. A bin is the mean of its samples, one a cell at least.

    Returns:
        of each image (R, C, size, size), float32 (float64 for float64 input), R the number of its
        boxes with an area. The gradient reaches ``maps``.

    Example:
        >>> maps = torch.arange(16.0).view(1, 1, 4, 4)
        >>> (crops,) = roi_crops(maps, [torch.tensor([[16.0, 0.0, 32.0, 16.0]])], stride=8, size=1)
        >>> crops.flatten()  # the mean of 2, 3, 6 and 7
        tensor([4.5000])
    """
    maps = maps.to(compute_dtype(maps))
    kept = [tensor[has_area(tensor)].to(maps) for tensor in boxes]
    # Autocast would give bfloat16 back.
    with torch.autocast(maps.device.type, enabled=False):
        crops = roi_align(maps, kept, size, spatial_scale=1 / stride, aligned=True)
    return list(crops.split([len(tensor) for tensor in kept]))
