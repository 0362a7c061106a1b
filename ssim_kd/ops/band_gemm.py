"""The Gaussian window as products with band matrices, for processors that like matrix products.

Maps lie as (H, n, W): n planes of H x W cells, rows outermost. Then a pass along the rows is one
product with everything flattened to (maps H n, W), and a pass down the columns is one product a
map with (H, n W). Only the band is multiplied: the axis is cut into blocks of a few cells, each of
which reads its own cells and the window's radius on both sides.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .window import band_matrix

# Cells in a block along W: one vector register of 16 floats wide, which matters more than the
# zeros that wider blocks multiply. Along H 16 was as good as anything.
ROW_BLOCK, COLUMN_BLOCK = 16, 16
# Up to this length an axis is not cut: one dense product beats a few narrow, unaligned ones.
WHOLE_ROW, WHOLE_COLUMN = 48, 32


class _Block(NamedTuple):
    """Output cells [out0, out1) are ``weight`` @ input cells [in0, in1)."""

    out0: int
    out1: int
    in0: int
    in1: int
    weight: Tensor
    weight_t: Tensor


@lru_cache(maxsize=256)
def _blocks(
    length: int,
    block: int,
    size: int,
    sigma: float,
    adjoint: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[_Block, ...]:
    matrix = band_matrix(length, size, sigma)
    matrix = matrix.t() if adjoint else matrix
    count = max(1, round(length / block))  # the last block takes the remainder
    ends = [i * block for i in range(count)] + [length]
    blocks = []
    for out0, out1 in pairwise(ends):
        used = matrix[out0:out1].ne(0).any(dim=0).nonzero()
        in0, in1 = int(used[0]), int(used[-1]) + 1
        weight = matrix[out0:out1, in0:in1].to(device, dtype).contiguous()
        blocks.append(_Block(out0, out1, in0, in1, weight, weight.t().contiguous()))
    return tuple(blocks)


class BandFilter:
    """One windowed mean of one buffer into another, ready to run again and again.

    The views of the blocks are cut once, here: a chunk of planes costs a call a block, no more.

    Args:
        x: (maps, H, n, W) contiguous, read whenever the filter runs.
        out: the same shape, written.
        axis: "rows" (along W) or "columns" (along H).
        size, sigma: of the window, in cells.
        adjoint: apply the transposed matrix.
    """

    def __init__(
        self, x: Tensor, out: Tensor, axis: str, size: int, sigma: float, *, adjoint: bool = False
    ):
        maps, h, n, w = x.shape
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []
        along_rows = axis == "rows"
        length, block = (w, ROW_BLOCK) if along_rows else (h, COLUMN_BLOCK)
        if length <= (WHOLE_ROW if along_rows else WHOLE_COLUMN):
            block = length
        for b in _blocks(length, block, size, sigma, adjoint, x.dtype, x.device):
            if along_rows:
                source, result = (
                    x.view(-1, w)[:, b.in0 : b.in1],
                    out.view(-1, w)[:, b.out0 : b.out1],
                )
                self._products.append((source, b.weight_t, result))
            else:
                for i in range(maps):
                    source = x[i, b.in0 : b.in1].view(-1, n * w)
                    result = out[i, b.out0 : b.out1].view(-1, n * w)
                    self._products.append((b.weight, source, result))

    def __call__(self) -> None:
        """Overwrite ``out`` with the windowed means of what ``x`` holds now."""
        for left, right, result in self._products:
            torch.mm(left, right, out=result)
