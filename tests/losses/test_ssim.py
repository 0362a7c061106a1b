"""The SSIM loss: values known by hand, parity with kornia, masks, autograd behaviour."""

import math

import pytest
import torch

from ssim_kd.losses import SSIMLoss, pyramid_ssim_loss, ssim_loss, ssim_map
from tests.native import NATIVE

FAST = ("eager", NATIVE)  # "native" is only for float32 and half precision
IMPLS = ("reference", "eager")


def maps(shape, kind="random", dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(2))
    if kind == "structured":
        y = torch.linspace(0, 1, shape[-1], dtype=torch.float64).expand(shape)
        x = y + 0.05 * x
    elif kind == "constant":
        x, y = torch.full_like(x, 0.3), torch.full_like(y, 0.7)
    elif kind == "zero":
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    return x.to(dtype), y.to(dtype)


def value_and_grad(x, y, **options):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    loss = ssim_loss(x, y, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_ssim_loss_of_constant_maps_by_hand(impl):
    # No variance: contrast and structure are 1, and luminance is (2 a b + C1) / (a^2 + b^2 + C1).
    x, y = maps((2, 3, 12, 13), "constant")
    luminance = (2 * 0.3 * 0.7 + 1e-4) / (0.3**2 + 0.7**2 + 1e-4)
    assert ssim_loss(x, y, impl=impl).item() == pytest.approx((1 - luminance) / 2, abs=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_ssim_loss_of_two_cells_by_hand(impl):
    # Two cells in a row see each other with weight p, and themselves with 1 - p.
    tap = [math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-1, 2)]
    p = (tap[0] + tap[2]) / sum(tap)  # both neighbours fold to the one other cell
    x, y = torch.tensor([[[[0.0, 1.0]]]]).double(), torch.tensor([[[[1.0, 0.0]]]]).double()
    total = 0.0
    for mx, my in ((p, 1 - p), (1 - p, p)):
        var, cov = p * (1 - p), -p * (1 - p)
        luminance = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
        total += luminance * (2 * cov + 9e-4) / (2 * var + 9e-4)
    expected = (1 - total / 2) / 2
    assert ssim_loss(x, y, window_size=3, impl=impl).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scaling", [None, "channel", "sample", "batch"])
def test_ssim_loss_of_equal_maps(impl, scaling):
    x, _ = maps((2, 3, 13, 21), dtype=torch.float32)
    loss, grad = value_and_grad(x, x, scaling=scaling, impl=impl)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("exponents", [(0.5, 0.5, 0.5), (1, 0.3, 0.7), (0, 0, 1), (0, 0, 0)])
def test_ssim_loss_of_equal_maps_with_exponents(exponents):
    x, _ = maps((1, 2, 9, 9))
    options = dict(zip(("alpha", "beta", "gamma"), exponents, strict=True))
    assert ssim_loss(x, x, **options).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["random", "structured", "constant", "zero"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (1, 2, 6, 6), (2, 1, 13, 21), (1, 2, 7, 50)])
@pytest.mark.parametrize("impl", IMPLS)
def test_ssim_loss_equals_kornia(kind, shape, impl):
    kornia = pytest.importorskip("kornia", reason="kornia is a test dependency")
    x, y = maps(shape, kind)
    reference = x.clone().requires_grad_()
    expected = kornia.losses.ssim_loss(reference, y, window_size=11, padding="same")
    expected.backward()
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        # kornia in float64 both times: its own float32 is off by up to 5e-5 on constant maps.
        loss, grad = value_and_grad(x.to(dtype), y.to(dtype), impl=impl)
        assert loss.item() == pytest.approx(expected.item(), abs=tolerance)
        torch.testing.assert_close(grad.double(), reference.grad, atol=tolerance, rtol=0)


def test_ssim_loss_valid_padding_equals_kornia():
    kornia = pytest.importorskip("kornia", reason="kornia is a test dependency")
    x, y = maps((1, 2, 14, 17))
    expected = kornia.losses.ssim_loss(x, y, window_size=11, padding="valid")
    assert ssim_loss(x, y, padding="valid").item() == pytest.approx(expected.item(), abs=1e-8)
    small = maps((1, 2, 10, 17))
    assert ssim_loss(*small, padding="valid") == ssim_loss(*small, padding="same")


@pytest.mark.parametrize("scaling", [None, "channel", "sample", "batch"])
@pytest.mark.parametrize("impl", IMPLS)
def test_ssim_loss_gradcheck(scaling, impl):
    x, y = maps((2, 1, 4, 5))
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[0, :, 3:] = False

    def loss(t):
        return ssim_loss(t, y, scaling=scaling, mask=mask, window_size=5, impl=impl)

    assert torch.autograd.gradcheck(loss, x.requires_grad_())


@pytest.mark.parametrize("exponents", [(0.5, 1, 1), (1, 0.5, 2), (2, 3, 3), (1, 0, 0.3), (0, 2, 0)])
def test_ssim_loss_gradcheck_with_exponents(exponents):
    x, y = maps((1, 2, 4, 5))
    options = dict(zip(("alpha", "beta", "gamma"), exponents, strict=True))
    assert torch.autograd.gradcheck(lambda t: ssim_loss(t, -y, **options), x.requires_grad_())


def test_ssim_loss_with_fractional_exponents_is_finite():
    zero, (x, _) = torch.zeros(1, 1, 8, 8), maps((1, 1, 8, 8), dtype=torch.float32)
    for a, b in ((zero, zero), (zero, x), (x, zero), (x, -x), (x, 1 - x)):
        for exponent in (0.3, 1.7):
            loss, grad = value_and_grad(a, b, alpha=exponent, beta=0.5, gamma=exponent)
            assert loss.isfinite() and grad.isfinite().all()


def test_ssim_map_components_multiply_to_ssim():
    x, y = maps((1, 2, 12, 12))
    parts = ssim_map(x, y, components=True, padding="valid")
    whole = ssim_map(x, y, padding="valid")
    assert whole.shape == (1, 2, 2, 2)
    product = parts.luminance * parts.contrast * parts.structure
    torch.testing.assert_close(product, whole, atol=1e-5, rtol=0)
    assert (1 - ssim_map(x, y).mean()) / 2 == pytest.approx(ssim_loss(x, y).item())


@pytest.mark.parametrize("impl", IMPLS)
def test_ssim_loss_with_mask_is_the_mean_of_samples(impl):
    x, y = maps((3, 2, 12, 14))
    mask = torch.zeros(3, 12, 14, dtype=torch.bool)
    mask[0, :6, :9] = True
    mask[1] = True  # and no valid cell in the third
    quality = ssim_map(x, y)
    expected = (1 - (quality[0, :, :6, :9].mean() + quality[1].mean()) / 2) / 2
    loss, grad = value_and_grad(x, y, mask=mask, impl=impl)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert value_and_grad(x, y, mask=mask[:, None], impl=impl)[0] == loss
    # Two processes with some samples each, averaged, equal one with all.
    halves = [value_and_grad(x[i : i + 1], y[i : i + 1], mask=mask[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(torch.cat([g for _, g in halves]) / 2, grad[:2])
    assert grad[2].abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scaling", [None, "channel", "batch"])
def test_ssim_loss_of_nothing(impl, scaling):
    x, y = maps((2, 3, 5, 4), dtype=torch.float32)
    mask = torch.zeros(2, 5, 4, dtype=torch.bool)
    for a, b, m in ((x, y, mask), (x[:0], y[:0], None), (x[..., :0], y[..., :0], None)):
        loss, grad = value_and_grad(a, b, mask=m, scaling=scaling, impl=impl)
        assert loss == 0 and grad.shape == a.shape and not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_pyramid_ssim_loss_is_the_weighted_sum(impl):
    levels = [maps((2, 2, s, s + 3), seed=s) for s in (16, 8, 4, 1)]
    inputs = [x.requires_grad_() for x, _ in levels]
    targets = [y for _, y in levels]
    masks = [None, torch.ones(2, 8, 11, dtype=torch.bool), None, None]
    weights = [1.0, 2.0, 0.0, -1.5]
    total, losses = pyramid_ssim_loss(
        inputs, targets, masks=masks, level_weights=weights, impl=impl, scaling="channel"
    )
    single = [ssim_loss(x, y, scaling="channel") for x, y in levels]
    torch.testing.assert_close(losses, torch.stack(single).detach())
    assert not losses.requires_grad
    together = torch.autograd.grad(total, inputs)
    apart = torch.autograd.grad(sum(w * v for w, v in zip(weights, single, strict=True)), inputs)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", FAST)
def test_ssim_loss_with_retained_graph_and_accumulation(impl):
    x, y = maps((1, 2, 9, 9), dtype=torch.float32)
    _, once = value_and_grad(x, y)
    x.requires_grad_()
    loss = ssim_loss(x, y, impl=impl)
    loss.backward(retain_graph=True)
    x.grad.mul_(3)  # whose it is does not matter to what the graph keeps
    torch.autograd.grad(loss, x, retain_graph=True)[0].mul_(5)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    ssim_loss(x, y, impl=impl).backward()
    torch.testing.assert_close(x.grad, 7 * once)


@pytest.mark.parametrize("impl", FAST)
def test_ssim_loss_batched_gradients(impl):
    x, y = maps((1, 2, 9, 9), dtype=torch.float32)
    _, once = value_and_grad(x, y)
    loss = ssim_loss(x.requires_grad_(), y, impl=impl)
    batch = torch.tensor([1.0, -2.0])
    (several,) = torch.autograd.grad(loss, x, batch, is_grads_batched=True)
    torch.testing.assert_close(several, torch.stack([once, -2 * once]))


@pytest.mark.parametrize("impl", FAST)
def test_ssim_loss_second_derivative(impl):
    x, y = maps((1, 1, 4, 4))
    t = x.float().requires_grad_()
    with pytest.raises(RuntimeError, match=r"second derivative.*impl='reference'"):
        torch.autograd.grad(ssim_loss(t, y.float(), impl=impl), t, create_graph=True)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: ssim_loss(t, y, impl="reference"), x)


def test_ssim_loss_without_gradient():
    x, y = maps((1, 2, 9, 9))
    assert not ssim_loss(x, y).requires_grad
    with torch.no_grad():
        assert not ssim_loss(x.requires_grad_(), y).requires_grad
    y.requires_grad_()
    ssim_loss(x, y).backward()
    assert y.grad is None, "the teacher's map is a constant"


def test_ssim_loss_module_equals_function():
    x, y = maps((2, 3, 20, 11), dtype=torch.float32)
    options = {"sigma": 2.0, "scaling": "sample", "window_size": 7}
    module = SSIMLoss(**options)
    assert module(x, y) == ssim_loss(x, y, **options)
    assert "sigma=2.0" in repr(module)
    first, second = value_and_grad(x, y, **options), value_and_grad(x, y, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", (*IMPLS, NATIVE))
def test_ssim_loss_in_half_precision_and_autocast(impl):
    x, y = maps((1, 2, 16, 16), dtype=torch.bfloat16)
    expected, grad = value_and_grad(x.float(), y.float(), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in ((x, y), (x.float(), y.float())):
            loss, half_grad = value_and_grad(a, b, impl=impl)
            assert loss.dtype == torch.float32 and half_grad.dtype == a.dtype
            assert loss == pytest.approx(expected.item(), abs=1e-6)
            torch.testing.assert_close(half_grad.float(), grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("impl", (*IMPLS, NATIVE))
def test_ssim_loss_after_inference_mode(impl):
    # What is kept of the window must not be an inference tensor.
    x, y = torch.rand(1, 1, 37, 17), torch.rand(1, 1, 37, 17)
    options = {"impl": impl, "window_size": 7, "sigma": 1.25}
    with torch.inference_mode():
        expected = ssim_loss(x, y, **options)
    loss = ssim_loss(x.requires_grad_(), y, **options)
    loss.backward()
    assert x.grad.any()
    torch.testing.assert_close(loss.detach(), expected.clone())


def test_ssim_loss_in_a_compiled_function():
    x, y = torch.rand(1, 2, 12, 12, requires_grad=True), torch.rand(1, 2, 12, 12)
    compiled = torch.compile(lambda a, b: 2 * ssim_loss(a, b), backend="eager")
    loss = compiled(x, y)
    loss.backward()
    torch.testing.assert_close(loss, 2 * ssim_loss(x, y))
    torch.testing.assert_close(
        x.grad, torch.autograd.grad(2 * ssim_loss(x, y), x)[0], atol=1e-7, rtol=1e-5
    )
