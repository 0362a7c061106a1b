"""The batch norm for maps that may have a single cell."""

import pytest
import torch
from torch import nn

from ssim_kd.modeling.norms import CellBatchNorm


@pytest.mark.parametrize(
    ("stock", "shape"), [(nn.BatchNorm2d, (2, 3, 4, 5)), (nn.BatchNorm1d, (7, 3))]
)
def test_cell_batch_norm_is_torchs_of_more_than_one_cell(stock, shape) -> None:
    ours, theirs = CellBatchNorm(3), stock(3)
    for _ in range(2):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3)])
def test_cell_batch_norm_of_one_cell_takes_the_running_statistics(shape) -> None:
    norm = CellBatchNorm(3)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    x = torch.tensor([5.0, 1.0, -3.0]).view(shape)
    torch.testing.assert_close(norm(x), (x - 1) / 2)
    assert norm.running_mean.tolist() == [1, 1, 1] and norm.num_batches_tracked == 0
    norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_cell_batch_norm_of_three_dimensions() -> None:
    with pytest.raises(ValueError, match="got 3 dimensions; expected 2 or 4"):
        CellBatchNorm(3)(torch.randn(2, 3, 4))
