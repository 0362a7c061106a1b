"""The windowed mean against a convolution, its adjoint, and derivatives."""

import pytest
import torch
import torch.nn.functional as F

from ssim_kd.ops.window import BLOCK, band_matrix, band_weights, gaussian_window, windowed_mean

LONG = 2 * BLOCK + 3  # an axis that is computed in blocks
SHAPES = [(12, 13), (LONG, 12), (12, LONG), (5 * BLOCK, 2 * BLOCK + 1)]


def maps(*shape):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1, 5, 11])
@pytest.mark.parametrize("height,width", SHAPES)
def test_windowed_mean_equals_convolution(height, width, size):
    x, sigma, radius = maps(2, 1, height, width), 0.3 * size, size // 2
    window = gaussian_window(size, sigma)
    kernel = (window[:, None] * window)[None, None]
    expected = F.conv2d(F.pad(x, [radius] * 4, mode="reflect"), kernel)
    torch.testing.assert_close(windowed_mean(x, size, sigma), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("size", [5, 25])
@pytest.mark.parametrize("height,width", [(1, 1), (6, 40), *SHAPES])
def test_windowed_mean_equals_dense_matrices(height, width, size, adjoint):
    x, sigma = maps(3, height, width), 0.3 * size
    rows, columns = (band_matrix(length, size, sigma) for length in (height, width))
    expected = rows.t() @ x @ columns if adjoint else rows @ x @ columns.t()
    result = windowed_mean(x, size, sigma, adjoint=adjoint)
    torch.testing.assert_close(result, expected, atol=1e-13, rtol=0)


def test_windowed_mean_of_two_cells_by_hand():
    weight = gaussian_window(3, 1.5)
    mean = windowed_mean(torch.tensor([[0.0, 1.0]], dtype=torch.float64), 3, 1.5)
    # The other cell is seen on both sides.
    assert mean.flatten().tolist() == pytest.approx([2 * weight[0].item(), weight[1].item()])


def test_windowed_mean_derivatives():
    x = maps(1, 5, LONG)[..., :7].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: windowed_mean(t, 5, 1.5), x)
    assert torch.autograd.gradgradcheck(lambda t: windowed_mean(t, 5, 1.5) ** 2, x)


@pytest.mark.parametrize("length", [1, 4, 12, LONG])
def test_band_weights_are_the_band_of_the_matrix(length):
    matrix, radius = band_matrix(length, 5, 1.5), 2
    outward, inward = band_weights(length, 5, 1.5)
    assert matrix.sum(1).tolist() == pytest.approx([1.0] * length)
    for i in range(length):
        for k in range(5):
            j = i + k - radius
            inside = 0 <= j < length
            assert outward[i, k].item() == pytest.approx(matrix[i, j].item() if inside else 0)
            assert inward[i, k].item() == pytest.approx(matrix[j, i].item() if inside else 0)
