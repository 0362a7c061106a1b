"""Means, sums, moments and cells under masks: values by hand, empty batches, gradients."""

import pytest
import torch

from ssim_kd.losses import channel_moments, masked_mean, masked_sum, valid_cells

VALUES = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 100.0]]], [[[7.0, 7.0]]]])  # 3 maps of 1 x 2 cells
MASK = torch.tensor([[[True, True]], [[True, False]], [[False, False]]])


@pytest.mark.parametrize("mask", [MASK, MASK[:, None]])
def test_masked_mean_by_hand(mask):
    values = VALUES.clone().requires_grad_()
    mean = masked_mean(values, mask)
    mean.backward()
    assert mean == (2 + 5) / 2  # the third sample is left out
    assert values.grad.flatten().tolist() == [0.25, 0.25, 0.5, 0, 0, 0]


def test_masked_mean_over_channels():
    assert masked_mean(torch.cat([VALUES, 3 * VALUES], 1), MASK) == 2 * (2 + 5) / 2
    for mask in (None, torch.ones_like(MASK)):
        assert masked_mean(VALUES, mask).item() == pytest.approx(123 / 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_mean_of_invalid_cells_that_are_not_finite(bad):
    values = VALUES.masked_fill(~MASK[:, None], bad).requires_grad_()
    mean = masked_mean(values, MASK)
    mean.backward()
    assert mean == 3.5 and values.grad.flatten().tolist() == [0.25, 0.25, 0.5, 0, 0, 0]


@pytest.mark.parametrize(
    "values,mask",
    [(VALUES, MASK & False), (VALUES[:0], None), (VALUES[:0], MASK[:0]), (VALUES[..., :0], None)],
)
def test_masked_mean_of_nothing(values, mask):
    values = values.clone().requires_grad_()
    mean = masked_mean(values, mask)
    mean.backward()
    assert mean == 0 and values.grad.shape == values.shape and not values.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_mean_dtype(dtype):
    values = VALUES.to(dtype).requires_grad_()
    mean = masked_mean(values, MASK)
    mean.backward()
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mean == 3.5 and values.grad.dtype == dtype


@pytest.mark.parametrize(
    "values,mask,key,value",
    [
        (VALUES[0], None, "values", "(1, 1, 2)"),
        (VALUES.long(), None, "values", "int64"),
        (VALUES, MASK.float(), "mask", "float32"),
        (VALUES, MASK[:2], "mask", "(2, 1, 2)"),
    ],
)
def test_masked_mean_bad_input(values, mask, key, value):
    with pytest.raises(ValueError) as error:
        masked_mean(values, mask)
    assert key in str(error.value) and value in str(error.value)


@pytest.mark.parametrize("mask", [MASK, MASK[:, None]])
def test_masked_sum_by_hand(mask):
    values = VALUES.masked_fill(~MASK[:, None], float("nan")).requires_grad_()
    total = masked_sum(values, mask)
    total.backward()
    assert total == 1 + 3 + 5
    assert values.grad.flatten().tolist() == [1, 1, 1, 0, 0, 0]
    assert masked_sum(VALUES) == 123
    assert masked_sum(VALUES.bfloat16(), MASK).dtype == torch.float32


def test_channel_moments_by_hand():
    # Over the batch: 1, 3, 5 of the first channel, three times that in the second.
    values = torch.cat([VALUES, 3 * VALUES], 1).masked_fill(~MASK[:, None], float("inf"))
    mean, std = channel_moments(values, MASK)
    assert mean.flatten().tolist() == [3, 9] and mean.shape == std.shape == (1, 2, 1, 1)
    assert std.flatten().tolist() == pytest.approx([2, 6])  # (4 + 0 + 4) / (3 - 1)


def test_channel_moments_equals_torch():
    values = torch.randn(3, 4, 5, 6, dtype=torch.double, requires_grad=True)
    mask = torch.ones(3, 5, 6, dtype=torch.bool)
    mean, std = channel_moments(values, mask)
    torch.testing.assert_close(mean, values.mean(dim=(0, 2, 3), keepdim=True))
    torch.testing.assert_close(std, values.std(dim=(0, 2, 3), keepdim=True))
    mask[1, 2:] = mask[2] = False
    inputs = values[..., :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: channel_moments(x, mask[..., :2]), (inputs,))


@pytest.mark.parametrize("valid", [0, 1, 2])
def test_channel_moments_of_hardly_any_cell_and_of_a_constant(valid):
    values = torch.full((1, 2, 1, 3), 7.0, requires_grad=True)
    mask = torch.arange(3).view(1, 1, 3) < valid
    mean, std = channel_moments(values, mask)
    assert mean.flatten().tolist() == [7.0 * (valid > 0)] * 2 and not std.any()
    std.sum().backward()
    assert not values.grad.any()


def test_valid_cells_are_those_of_all_images_in_turn():
    values = torch.arange(12.0).view(2, 3, 1, 2)
    mask = torch.tensor([[[True, False]], [[True, True]]])
    assert valid_cells(values, mask).tolist() == [[0, 2, 4], [6, 8, 10], [7, 9, 11]]
    assert torch.equal(valid_cells(values), valid_cells(values, torch.ones_like(mask)))
