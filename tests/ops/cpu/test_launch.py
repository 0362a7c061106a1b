"""The C kernels: threads, copies, windows, unusual maps. Values: test_implementations.py."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ssim_kd.losses import pyramid_ssim_loss, ssim_loss
from ssim_kd.ops.cpu import launch
from tests.native import needs_compiler

X, Y = (torch.rand(2, 3, 9, 10, generator=torch.Generator().manual_seed(i)) for i in range(2))


def value_and_grad(x, y, **options):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = ssim_loss(x, y, impl="native", **options)
    loss.backward()
    return loss.detach(), x.grad


@needs_compiler
@pytest.mark.parametrize("scaling", [None, "channel", "sample", "batch"])
@pytest.mark.parametrize("masked", [False, True])
def test_run_levels_with_threads_and_copies(monkeypatch, scaling, masked):
    options = {"scaling": scaling, "mask": X[:, 0] > 0.2 if masked else None}
    expected = value_and_grad(X, Y, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for budget in (1, 4 << 20):  # bytes: one plane at a time, all at once
                monkeypatch.setattr(launch, "STAGED_BYTES", budget)
                for x, y in ((X, Y), (X.to(memory_format=torch.channels_last), Y)):
                    loss, grad = value_and_grad(x, y, **options)
                    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("size", [1, 3, 25])
def test_run_levels_with_other_windows(size):
    options = {"window_size": size, "sigma": 4.0, "scaling": "batch"}
    for shape in ((2, 5, 6, 40), (1, 2, 40, 6), (1, 1, 1, 1)):
        x, y = (torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
        loss, grad = value_and_grad(x, y, **options)
        t = x.double().requires_grad_()
        exact = ssim_loss(t, y.double(), impl="reference", **options)
        exact.backward()
        assert abs(loss - exact) < 1e-6
        assert (grad - t.grad).norm() <= 1e-5 * t.grad.norm()


@needs_compiler
def test_run_levels_without_gradient():
    x = X.clone().requires_grad_()
    total, levels = pyramid_ssim_loss([x, X], [Y, Y], level_weights=[0.0, 2.0], impl="native")
    total.backward()
    assert total == 2 * levels[1] and levels[0] > 0 and not x.grad.any()


@needs_compiler
@pytest.mark.parametrize("width", [64, 100, 128])
def test_run_levels_with_an_unusual_border(width):
    # The moments lose no digits only if the shift is the mean of the whole plane.
    x, y = (10 + 0.01 * torch.rand(2, 3, 40, width, generator=torch.Generator().manual_seed(i))
            for i in range(2))  # fmt: skip
    x[..., :8] *= 0.1
    y[..., :8] *= 0.1
    t = x.double().requires_grad_()
    exact = ssim_loss(t, y.double(), impl="reference")
    exact.backward()
    for impl in ("native", "eager"):
        s = x.clone().requires_grad_()
        loss = ssim_loss(s, y, impl=impl)
        loss.backward()
        assert abs(loss - exact) < 2e-5
        assert (s.grad - t.grad).norm() < 1e-3 * t.grad.norm()


@needs_compiler
def test_run_levels_of_wide_flat_maps():
    for level in (0.3, 0.7):
        x = torch.full((1, 2, 20, 4000), level)
        exact = ssim_loss(x.double(), 1.5 * x.double(), impl="reference")
        assert abs(ssim_loss(x, 1.5 * x, impl="native") - exact) < 1e-6


@needs_compiler
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_run_levels_of_maps_without_memory():
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"impl='native'.* memory"):
        ssim_loss(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), impl="native")


@needs_compiler
def test_run_levels_of_negative_views():
    assert torch.equal(*(ssim_loss(x, Y, impl="native") for x in (torch._neg_view(-X), X)))
