"""Attention maps and what they are made of: values by hand, loops in float64, masks, gradients."""

import math

import pytest
import torch

from ssim_kd.losses import (
    cell_means,
    channel_attention,
    masked_log_softmax,
    masked_softmax,
    spatial_attention,
)

# Valid are 3 x 4 of 5 x 6 cells, all, and none.
MASK = torch.zeros(3, 5, 6, dtype=torch.bool)
MASK[0, :3, :4] = True
MASK[1] = True


def maps(dtype=torch.float64, grad=False):
    return torch.randn(3, 4, 5, 6, dtype=dtype).requires_grad_(grad)


def loops(x, tau, mask):
    """Both attention maps, cell by cell."""
    n, c, h, w = x.shape
    spatial, channel = torch.zeros(n, 1, h, w).double(), torch.zeros(n, c, 1, 1).double()
    for i in range(n):
        valid = [(a, b) for a in range(h) for b in range(w) if mask[i, a, b]]
        strengths = {p: sum(abs(float(x[i, k][p])) for k in range(c)) / c for p in valid}
        total = sum(math.exp(v / tau) for v in strengths.values())
        for p, v in strengths.items():
            spatial[i, 0][p] = len(valid) * math.exp(v / tau) / total
        means = [sum(abs(float(x[i, k][p])) for p in valid) / max(len(valid), 1) for k in range(c)]
        total = sum(math.exp(v / tau) for v in means)
        for k in range(c):
            channel[i, k] = c * math.exp(means[k] / tau) / total
    return spatial, channel


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("mask", [None, MASK, MASK[:, None]], ids=["full", "padded", "n1hw"])
def test_attention_is_the_formula_by_loops(tau, mask):
    x = maps()
    spatial, channel = loops(x, tau, torch.ones_like(MASK) if mask is None else MASK)
    torch.testing.assert_close(spatial_attention(x, temperature=tau, mask=mask), spatial)
    torch.testing.assert_close(channel_attention(x, temperature=tau, mask=mask), channel)


def test_spatial_attention_by_hand():
    # The mean of |x| over two channels is 0 and log 4: 2 (1, 4) / 5.
    x = torch.tensor([[0.0, 2 * math.log(4)], [0.0, 0.0]]).view(1, 2, 1, 2)
    found = spatial_attention(-x, temperature=1.0)
    torch.testing.assert_close(found, torch.tensor([[[[0.4, 1.6]]]]))


def test_channel_attention_by_hand():
    # Means of log 2 and 0 at temperature 1/2: 2 (4, 1) / 5.
    x = torch.tensor([[2 * math.log(2), 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    found = channel_attention(x, temperature=0.5)
    torch.testing.assert_close(found.flatten(), torch.tensor([1.6, 0.4]))


@pytest.mark.parametrize("function", [spatial_attention, channel_attention])
def test_attention_of_padding_that_is_not_finite(function):
    x = maps()
    expected = function(x, temperature=0.5, mask=MASK)
    spoiled = x.masked_fill(~MASK[:, None], math.inf).requires_grad_()
    found = function(spoiled, temperature=0.5, mask=MASK)
    torch.testing.assert_close(found, expected)
    (found * torch.randn_like(found)).sum().backward()
    assert torch.isfinite(spoiled.grad).all() and spoiled.grad[0, :, :3, :4].any()
    assert not spoiled.grad[~MASK[:, None].expand_as(x)].any()


@pytest.mark.parametrize("function", [spatial_attention, channel_attention, cell_means])
def test_gradients(function):
    options = {} if function is cell_means else {"temperature": 0.5}
    x = maps(grad=True)
    for mask in (None, MASK):
        assert torch.autograd.gradcheck(lambda x, m=mask: function(x, mask=m, **options), x)


@pytest.mark.parametrize("function", [spatial_attention, channel_attention])
def test_attention_of_half_precision_is_float32(function):
    x = maps(torch.float32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = function(x, temperature=0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, function(x.float(), temperature=0.1))


def test_masked_softmax_sums_to_1_over_the_valid_cells():
    x = 1e4 * maps(torch.float32)
    found, logs = masked_softmax(x, MASK), masked_log_softmax(x, MASK)
    padding = ~MASK[:, None].expand_as(x)
    assert found.sum(dim=(2, 3)).tolist() == [[pytest.approx(1)] * 4] * 2 + [[0] * 4]
    assert not found[padding].any() and not logs[padding].any()
    cropped = x[:1, :, :3, :4]
    torch.testing.assert_close(found[:1, :, :3, :4], masked_softmax(cropped))
    torch.testing.assert_close(logs[:1, :, :3, :4], masked_log_softmax(cropped))


def test_cell_means_by_hand():
    x = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 100.0]]], [[[7.0, 7.0]]]])
    mask = torch.tensor([[[True, True]], [[True, False]], [[False, False]]])
    assert cell_means(x, mask).flatten().tolist() == [2, 5, 0]
    assert cell_means(x).flatten().tolist() == [2, 52.5, 7]


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"\(3, 5, 6\)"):
        spatial_attention(maps(), temperature=1.0, mask=MASK[:1])
