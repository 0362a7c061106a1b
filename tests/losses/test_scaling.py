"""minmax_scale: range, scopes, kornia, gradients, constant and extreme maps."""

import pytest
import torch

from ssim_kd.losses import minmax_scale

X = torch.rand(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 6, 7, dtype=torch.bool)
MASK[0, 4:] = False


@pytest.mark.parametrize(
    "scope,dims", [("channel", (2, 3)), ("sample", (1, 2, 3)), ("batch", None)]
)
def test_minmax_scale_spans_zero_to_one(scope, dims):
    scaled = minmax_scale(X, scope=scope)
    dims = dims or (0, 1, 2, 3)
    torch.testing.assert_close(scaled.amin(dims), torch.zeros_like(scaled.amin(dims)))
    torch.testing.assert_close(scaled.amax(dims), torch.ones_like(scaled.amin(dims)))
    inner = minmax_scale(X, scope=scope, mask=MASK)[0, :, :4]
    assert inner.min() >= 0 and inner.max() <= 1


def test_minmax_scale_equals_kornia():
    kornia = pytest.importorskip("kornia", reason="kornia is a test dependency")
    expected = kornia.enhance.normalize_min_max(X, eps=1e-12)
    torch.testing.assert_close(minmax_scale(X), expected)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("scope", ["channel", "sample", "batch"])
def test_minmax_scale_gradcheck(scope, through):
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
def test_minmax_scale_of_constant_and_extreme_maps(value):
    x = torch.full((1, 2, 3, 3), value)
    x[0, 1, 0, 0] += 1e-5
    if value < 0:
        x[0, 1, 0, 0] = 3e38
    x.requires_grad_()
    scaled = minmax_scale(x)
    scaled.sum().backward()
    assert scaled.isfinite().all() and x.grad.isfinite().all()
    assert not scaled[0, 0].any() and not x.grad[0, 0].any()


def test_minmax_scale_bad_input():
    with pytest.raises(ValueError, match=r"^scope is 'layer'; .*'channel'"):
        minmax_scale(X, scope="layer")
    with pytest.raises(ValueError, match=r"^x .*\(3, 6, 7\)"):
        minmax_scale(X[0])
    assert minmax_scale(X[:0]).shape == (0, 3, 6, 7)
