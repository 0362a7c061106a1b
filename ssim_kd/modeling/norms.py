"""A batch norm for maps that may have a single cell."""

import torch
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class CellBatchNorm(_BatchNorm):
    """Batch norm of maps (N, C, H, W) or cells (M, C).

    A channel with a single value has no variance; it takes the running statistics.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"CellBatchNorm got {input.dim()} dimensions; expected 2 or 4.")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalised input, of equal shape."""
        if not self.training or input.numel() > self.num_features:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
