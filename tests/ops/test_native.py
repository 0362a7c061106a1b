"""The C kernels: their build, and what only they have. Values: test_implementations_agree.py."""

import logging

import pytest
import torch

from ssim_kd.losses import SSIMLoss, pyramid_ssim_loss, ssim_loss
from ssim_kd.ops import dispatch, native_build, ssim_native

X, Y = (torch.rand(2, 3, 9, 10, generator=torch.Generator().manual_seed(i)) for i in range(2))


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process, where nothing was built or said."""
    ssim_native._library.cache_clear()
    monkeypatch.setattr(dispatch, "_said", set())
    yield
    ssim_native._library.cache_clear()


def value_and_grad(x, y, **options):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = ssim_loss(x, y, impl="native", **options)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("scaling", [None, "channel", "sample", "batch"])
@pytest.mark.parametrize("masked", [False, True])
def test_threads_and_copies_do_not_change_a_bit(monkeypatch, scaling, masked):
    options = {"scaling": scaling, "mask": X[:, 0] > 0.2 if masked else None}
    expected = value_and_grad(X, Y, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for budget in (1, 4 << 20):  # bytes: one plane at a time, all at once
                monkeypatch.setattr(ssim_native, "STAGED_BYTES", budget)
                for x, y in ((X, Y), (X.to(memory_format=torch.channels_last), Y)):
                    loss, grad = value_and_grad(x, y, **options)
                    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 3, 25])
def test_other_windows(size):
    options = {"window_size": size, "sigma": 4.0, "scaling": "batch"}
    for shape in ((2, 5, 6, 40), (1, 2, 40, 6), (1, 1, 1, 1)):
        x, y = (torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
        loss, grad = value_and_grad(x, y, **options)
        t = x.double().requires_grad_()
        exact = ssim_loss(t, y.double(), impl="reference", **options)
        exact.backward()
        assert abs(loss - exact) < 1e-6
        assert (grad - t.grad).norm() <= 1e-5 * t.grad.norm()


def test_a_level_weight_of_zero_and_levels_without_gradient():
    x = X.clone().requires_grad_()
    total, levels = pyramid_ssim_loss([x, X], [Y, Y], level_weights=[0.0, 2.0], impl="native")
    total.backward()
    assert total == 2 * levels[1] and levels[0] > 0 and not x.grad.any()


def test_without_a_compiler_auto_goes_on_with_eager_and_says_why(fresh, caplog, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native_build, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.INFO, logger="ssim_kd"):
        loss = ssim_loss(X, Y)
    assert "'auto' takes 'eager' on cpu (no C compiler: CC is not set" in caplog.text
    assert loss == ssim_loss(X, Y, impl="eager")
    with pytest.raises(RuntimeError, match=r"impl='native' cannot be had: no C compiler"):
        SSIMLoss(impl="native")


@pytest.mark.parametrize("compiler,why", [("false", "failed"), ("/no/such/cc -m64", "No such")])
def test_a_broken_compiler_is_named(fresh, monkeypatch, compiler, why):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(RuntimeError, match=rf"impl='native' cannot be had: '{compiler} .*{why}"):
        ssim_loss(X, Y, impl="native")


def test_what_it_cannot_serve():
    with pytest.raises(RuntimeError, match="impl='native' cannot be had: float64 maps"):
        ssim_loss(X.double(), Y.double(), impl="native")
    with pytest.raises(RuntimeError, match=r"maps are on meta, and it is for a CPU"):
        ssim_loss(X.to("meta"), Y.to("meta"), impl="native")
