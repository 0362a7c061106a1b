"""lp_loss and LpLoss: values by hand, gradients, masks, bad input."""

import pytest
import torch

from ssim_kd.losses import LpLoss, lp_loss

X = torch.rand(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X.flip(-1) * 2 - 0.3
MASK = torch.ones(2, 6, 7, dtype=torch.bool)
MASK[0, 4:] = False


def test_lp_loss_by_hand():
    x, y = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, 4.0]]]])
    assert lp_loss(x, y, p=1) == 1.5
    assert lp_loss(x, y, p=2) == 2.5
    assert lp_loss(x, y, p=2, mask=torch.tensor([[[True, False]]])) == 1.0
    assert lp_loss(x, x) == 0


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("scaling", [None, "channel", "sample", "batch"])
def test_lp_loss_gradcheck_and_module(p, scaling):
    x = X.clone().requires_grad_()
    options = {"p": p, "scaling": scaling}
    assert torch.autograd.gradcheck(lambda t: lp_loss(t, Y, mask=MASK, **options), x)
    assert LpLoss(**options)(X, Y, MASK) == lp_loss(X, Y, mask=MASK, **options)


def test_lp_loss_of_nothing_and_of_half_precision():
    x = X[:0].clone().requires_grad_()
    lp_loss(x, Y[:0]).backward()
    assert x.grad.shape == x.shape
    x = X.clone().requires_grad_()
    loss = lp_loss(x, Y, mask=torch.zeros_like(MASK))
    loss.backward()
    assert loss == 0 and not x.grad.any()
    assert lp_loss(X.half(), Y.half()).dtype == torch.float32


@pytest.mark.parametrize("p", [1, 2])
def test_lp_loss_with_infinite_masked_cells(p):
    x, y = torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2)
    y[..., 1] = float("inf")
    mask = torch.tensor([[[True, False]] * 2])
    loss = lp_loss(x, y, p=p, mask=mask)
    loss.backward()
    assert loss == 1 and x.grad.flatten().tolist() == [p / 2, 0, p / 2, 0]


def test_lp_loss_bad_options():
    for bad in ({"p": 3}, {"scaling": "layer"}):
        with pytest.raises(ValueError, match=repr(*bad.values())):
            lp_loss(X, Y, **bad)
        with pytest.raises(ValueError, match=repr(*bad.values())):
            LpLoss(**bad)
