"""Ground-truth boxes on the cells of a level: which cells they cover, and how much each counts.

Boxes are in pixels and are divided by the stride of the level, never by a share of the image: a map
is padded, so that its cells are no share of any one image.

Shapes: N images, R boxes, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def box_cells(boxes: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The first and last cells of each box: from floor(x0 / stride) to ceil(x1 / stride).

    Both ends are included, as in FGD's code: a box always reaches one cell beyond its last pixel,
    unless that lies within a cell.

    Args:
        boxes: (R, 4), x0, y0, x1, y1 in pixels.
        stride: of the level, in pixels.

    Returns:
        (first, last): (R, 2) each, x and y, whole numbers as floats; they may lie beyond the map.
    """
    return (boxes[:, :2] / stride).floor(), (boxes[:, 2:] / stride).ceil()


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
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
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
        (N, H, W) float32, 0 where no box is, and in invalid cells.

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
        foreground: (N, H, W), 0 where no box is.
        mask: (N, H, W) bool, True where a cell is valid; None: all cells are.

    Returns:
        (N, H, W) float32; the cells of an image sum to 1, or to 0 if boxes cover it all.
    """
    background = foreground == 0
    if mask is not None:
        background = background & mask
    return background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)
