"""The lp loss and the min-max scaling."""

import pytest
import torch

from ssim_kd.losses import LpLoss, lp_loss, minmax_scale

X = torch.rand(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X.flip(-1) * 2 - 0.3
MASK = torch.ones(2, 6, 7, dtype=torch.bool)
MASK[0, 4:] = False


def test_lp_by_hand():
    x, y = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, 4.0]]]])
    assert lp_loss(x, y, p=1) == 1.5
    assert lp_loss(x, y, p=2) == 2.5
    assert lp_loss(x, y, p=2, mask=torch.tensor([[[True, False]]])) == 1.0
    assert lp_loss(x, x) == 0


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("scaling", [None, "channel", "sample", "batch"])
def test_lp_gradcheck_and_module(p, scaling):
    x = X.clone().requires_grad_()
    options = {"p": p, "scaling": scaling}
    assert torch.autograd.gradcheck(lambda t: lp_loss(t, Y, mask=MASK, **options), x)
    assert LpLoss(**options)(X, Y, MASK) == lp_loss(X, Y, mask=MASK, **options)


def test_lp_of_nothing_and_of_half():
    x = X[:0].clone().requires_grad_()
    lp_loss(x, Y[:0]).backward()
    assert x.grad.shape == x.shape
    x = X.clone().requires_grad_()
    loss = lp_loss(x, Y, mask=torch.zeros_like(MASK))
    loss.backward()
    assert loss == 0 and not x.grad.any()
    assert lp_loss(X.half(), Y.half()).dtype == torch.float32


@pytest.mark.parametrize("p", [1, 2])
def test_infinities_in_masked_cells_do_not_reach_the_gradient(p):
    x, y = torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2)
    y[..., 1] = float("inf")
    mask = torch.tensor([[[True, False]] * 2])
    loss = lp_loss(x, y, p=p, mask=mask)
    loss.backward()
    assert loss == 1 and x.grad.flatten().tolist() == [p / 2, 0, p / 2, 0]


def test_lp_bad_options():
    for bad in ({"p": 3}, {"scaling": "layer"}):
        with pytest.raises(ValueError, match=repr(*bad.values())):
            lp_loss(X, Y, **bad)
        with pytest.raises(ValueError, match=repr(*bad.values())):
            LpLoss(**bad)


@pytest.mark.parametrize(
    "scope,dims", [("channel", (2, 3)), ("sample", (1, 2, 3)), ("batch", None)]
)
def test_scaling_spans_zero_to_one_over_its_scope(scope, dims):
    scaled = minmax_scale(X, scope=scope)
    dims = dims or (0, 1, 2, 3)
    torch.testing.assert_close(scaled.amin(dims), torch.zeros_like(scaled.amin(dims)))
    torch.testing.assert_close(scaled.amax(dims), torch.ones_like(scaled.amin(dims)))
    inner = minmax_scale(X, scope=scope, mask=MASK)[0, :, :4]
    assert inner.min() >= 0 and inner.max() <= 1


def test_scaling_equals_kornia():
    kornia = pytest.importorskip("kornia", reason="kornia is a test dependency")
    expected = kornia.enhance.normalize_min_max(X, eps=1e-12)
    torch.testing.assert_close(minmax_scale(X), expected)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("scope", ["channel", "sample", "batch"])
def test_scaling_gradcheck(scope, through):
    if through:
        assert torch.autograd.gradcheck(
            lambda t: minmax_scale(t, scope=scope, mask=MASK), X.clone().requires_grad_()
        )
        return
    x = X.clone().requires_grad_()
    minmax_scale(x, scope=scope, grad_through_extrema=False).sum().backward()
    dims = {"channel": (2, 3), "sample": (1, 2, 3), "batch": (0, 1, 2, 3)}[scope]
    slope = 1 / (X.amax(dims, keepdim=True) - X.amin(dims, keepdim=True))
    torch.testing.assert_close(x.grad, slope.expand_as(X))


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0, -3e38])
def test_constant_and_extreme_maps_stay_finite(value):
    x = torch.full((1, 2, 3, 3), value)
    x[0, 1, 0, 0] += 1e-5
    if value < 0:
        x[0, 1, 0, 0] = 3e38
    x.requires_grad_()
    scaled = minmax_scale(x)
    scaled.sum().backward()
    assert scaled.isfinite().all() and x.grad.isfinite().all()
    assert not scaled[0, 0].any() and not x.grad[0, 0].any()


def test_scaling_bad_input():
    with pytest.raises(ValueError, match=r"scope must be one of 'channel'.*got 'layer'"):
        minmax_scale(X, scope="layer")
    with pytest.raises(ValueError, match=r"got \(3, 6, 7\)"):
        minmax_scale(X[0])
    assert minmax_scale(X[:0]).shape == (0, 3, 6, 7)
