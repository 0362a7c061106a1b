"""The windowed mean of a chunk of planes along one axis, as products with a band matrix.

Maps lie as (H, n W): n planes of H x W cells, rows outermost, so that a product down the columns
has long rows. Only the band is multiplied: the axis is cut into blocks of a few cells, each of
which reads its own cells and the window's radius on both sides.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .window import band_matrix

# Along the rows a block is as wide as a vector register (16 floats) or two; along the columns,
# where a product's rows are long anyway, the fewer zeros it multiplies the better.
ROW_BLOCK, COLUMN_BLOCK = 16, 8
# Up to this length an axis is not cut: one dense product beats a few narrow ones.
WHOLE = 31


class Window(NamedTuple):
    """Size of the window in cells, and sigma of its Gaussian, likewise."""

    size: int
    sigma: float


class _Run(NamedTuple):
    """``blocks`` blocks of one weight, side by side. The first one's output cells [out0, out0 +
    ``size``) are ``weight`` (size, read) @ input cells [in0, in0 + read)."""

    blocks: int
    size: int
    read: int
    out0: int
    in0: int
    weight: Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _runs(
    length: int, block: int, window: Window, adjoint: bool, dtype: torch.dtype, device: torch.device
) -> tuple[_Run, ...]:
    """The band matrix in blocks of ``block`` cells; the last one takes the remainder."""
    matrix = band_matrix(length, window.size, window.sigma)
    matrix = matrix.t() if adjoint else matrix
    count = 1 if length <= WHOLE else length // block
    runs: list[_Run] = []
    for out0, out1 in pairwise([i * block for i in range(count)] + [length]):
        used = matrix[out0:out1].ne(0).any(dim=0).nonzero()
        in0, in1 = int(used[0]), int(used[-1]) + 1
        weight = matrix[out0:out1, in0:in1].to(device, dtype).contiguous()
        last = runs[-1] if runs else None
        if (
            last is not None
            and torch.equal(last.weight, weight)
            and in0 == last.in0 + last.blocks * block
        ):
            runs[-1] = last._replace(blocks=last.blocks + 1)
        else:
            runs.append(_Run(1, out1 - out0, in1 - in0, out0, in0, weight))
    return tuple(runs)


class RowFilter:
    """One windowed mean of one buffer into another along the rows, ready to run again and again.

    The views of the blocks are cut once, here: a chunk of planes costs a call a block, no more.

    Args:
        x: (maps, H, n W) contiguous, read whenever the filter runs.
        out: the same shape, written.
        width: W.
        window: its size and sigma.
        adjoint: apply the transposed matrix.
    """

    def __init__(
        self, x: Tensor, out: Tensor, width: int, window: Window, *, adjoint: bool = False
    ):
        source, result = x.view(-1, width), out.view(-1, width)
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []
        for run in _runs(width, ROW_BLOCK, window, adjoint, x.dtype, x.device):
            weight = run.weight.t().contiguous()
            for i in range(run.blocks):
                cells = source.narrow(1, run.in0 + i * run.size, run.read)
                filtered = result.narrow(1, run.out0 + i * run.size, run.size)
                self._products.append((cells, weight, filtered))

    def __call__(self) -> None:
        """Overwrite ``out`` with the windowed means of what ``x`` holds now."""
        for cells, weight, filtered in self._products:
            torch.mm(cells, weight, out=filtered)


class ColumnFilter:
    """The same down the columns; blocks of one weight are one call a map."""

    def __init__(self, x: Tensor, out: Tensor, window: Window, *, adjoint: bool = False):
        height = x.shape[1]
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []
        for run in _runs(height, COLUMN_BLOCK, window, adjoint, x.dtype, x.device):
            if run.size == height:  # the maps are the batch
                self._products.append((run.weight.expand(len(x), -1, -1), x, out))
                continue
            for source, result in zip(x, out, strict=True):
                last = run.blocks - 1
                cells = source.narrow(0, run.in0, run.read + last * run.size)
                cells = cells.unfold(0, run.read, run.size).transpose(1, 2)  # windows overlap
                filtered = result.narrow(0, run.out0, run.blocks * run.size)
                filtered = filtered.view(run.blocks, run.size, -1)
                self._products.append((run.weight.expand(run.blocks, -1, -1), cells, filtered))

    def __call__(self) -> None:
        """Overwrite ``out`` with the windowed means of what ``x`` holds now."""
        for weight, cells, filtered in self._products:
            torch.bmm(weight, cells, out=filtered)
