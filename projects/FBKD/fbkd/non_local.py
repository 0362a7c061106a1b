"""The non-local block of FBKD."""

import torch
from torch import nn
from torch.nn import functional as F

from ssim_kd.losses import valid_cells
from ssim_kd.modeling import CellBatchNorm


class NonLocal(nn.Module):
    """x_p + BN(W sum_k (theta(x_p) . phi_k) g_k / K): each cell by its dot products with K others.

    Keys phi and values g are 1x1 convolutions of x, max-pooled. The norm begins as 0, the block as
    the identity.
    """

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        """
        Args:
            channels: C of the maps.
            inner: width of queries, keys and values.
            stride: side of the pooling in cells.
        """
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        # The norm would take a bias away.
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = CellBatchNorm(channels)
        nn.init.zeros_(self.norm.weight)
        self.stride = stride

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
            mask: (N, H, W) bool, the cells that count; None: all.

        Returns:
            (M, C): the M cells of all images that count.
        """
        key = self._pool(self.key(x), mask).flatten(2)
        value = self._pool(self.value(x), mask).flatten(2)
        count: torch.Tensor | int = key.shape[2]
        if mask is not None:
            windows = self._pool(mask[:, None].to(x.dtype), None)
            count = windows.sum(dim=(2, 3), keepdim=True)[..., 0].clamp(min=1)
        # (query . key) value is query (key value): no matrix of all pairs of cells is needed.
        mixing = value @ key.transpose(1, 2) / count
        found = (mixing @ self.query(x).flatten(2)).unflatten(2, x.shape[2:])
        return valid_cells(x, mask) + self.norm(valid_cells(self.out(found), mask))

    def _pool(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The maximum of the cells that count; 0 if none does. Maps smaller than the side, and
        what is left over at the right and bottom, are pooled as they are."""
        if mask is None:
            return F.max_pool2d(x, self.stride, ceil_mode=True)
        least = torch.finfo(x.dtype).min
        pooled = F.max_pool2d(x.masked_fill(~mask[:, None], least), self.stride, ceil_mode=True)
        return pooled.masked_fill(pooled == least, 0.0)
