"""Which cells of a map count in a loss, and how much each of them weighs.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 maps, float32 for all others: half precision cannot hold a variance."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_maps(input: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` unless both are floating (N, C, H, W) maps of one shape and device."""
    for name, x in (("input", input), ("target", target)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a floating point tensor (N, C, H, W); got {what}")
    if input.shape != target.shape:
        raise ValueError(
            "input and target must have the same shape; "
            f"got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if input.device != target.device:
        raise ValueError(
            f"input and target must be on the same device; got {input.device} and {target.device}"
        )


def check_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``mask`` as (N, H, W) bool on the map's device, or raise ``ValueError``."""
    if mask is None:
        return None
    n, _, h, w = x.shape
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((n, h, w), (n, 1, h, w)):
        raise ValueError(
            f"mask must be bool of shape {(n, h, w)} or {(n, 1, h, w)}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask must be on {x.device}, where the map is; got {mask.device}")
    return mask.reshape(n, h, w)


def cell_weights(shape: torch.Size, like: Tensor, mask: Tensor | None, crop: int) -> Tensor | None:
    """Weight of each cell of a map in the loss, the same for all channels.

    The loss is the mean over samples of the mean over a sample's valid cells and channels.
    Averaging by sample first makes two processes with half the batch each, averaged by DDP, equal
    one process with the whole batch, whatever the images' sizes. Samples without any valid cell
    do not count; if none counts, all weights are 0 (and so are the loss and its gradient).

    Args:
        shape: (N, C, H, W) of the map.
        like: gives dtype and device of the weights.
        mask: (N, H, W) bool, True where a cell is valid, or None for all.
        crop: cells to leave out along each side.

    Returns:
        (N, H, W) weights; summed over cells and channels they give 1 (or 0). None where every
        element weighs 1 / (N C H W).
    """
    if mask is None and crop == 0:
        return None
    n, c, h, w = shape
    inner = torch.zeros(n, h, w, dtype=torch.bool, device=like.device)
    inside = (slice(None), slice(crop, h - crop), slice(crop, w - crop))
    inner[inside] = True if mask is None else mask[inside]
    cells = inner.sum(dim=(1, 2), keepdim=True)
    samples = (cells > 0).sum()
    return inner.to(like.dtype) / (c * cells.clamp(min=1) * samples.clamp(min=1)).to(like.dtype)


def loss_of_sum(total: Tensor, shape: torch.Size, weights: Tensor | None) -> Tensor:
    """The loss, the weighted mean of (1 - S) / 2, from ``total``, the sum of S over all elements.

    Args:
        total: scalar; weighted, if there are weights.
        shape: (N, C, H, W) of the map.
        weights: those of ``cell_weights``.
    """
    if weights is None:
        return 0.5 - 0.5 * total / shape.numel()
    return 0.5 * (shape[1] * weights.double().sum() - total)
