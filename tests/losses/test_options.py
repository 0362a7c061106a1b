"""Bad options and tensors that do not fit: a clear error that carries the value."""

import logging

import pytest
import torch

from ssim_kd.losses import SSIMLoss, check_ssim_options, pyramid_ssim_loss, ssim_loss
from ssim_kd.ops import select
from tests.native import needs_compiler

NAN, INF = float("nan"), float("inf")
X = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(
    "name,values",
    {
        "window_size": (10, 0, -3, 3.0, "11", True),
        "sigma": (0, -1.0, NAN, INF, "1.5"),
        "data_range": (0, -1, NAN, INF),
        "k1": (-0.1, NAN),
        "k2": (-0.1, INF),
        "alpha": (-1, NAN),
        "beta": (-1, None),
        "gamma": (-0.5, INF),
        "padding": ("reflect", None),
        "scaling": ("layer", True),
        "scaling_grad": ("yes", None),
        "impl": ("cuda", None),
    }.items(),
)
def test_bad_option_is_named_with_its_value(name, values):
    for value in values:
        for function in (check_ssim_options, SSIMLoss, lambda **o: ssim_loss(X, X, **o)):
            with pytest.raises(ValueError, match=name) as error:
                function(**{name: value})
            assert repr(value) in str(error.value)


def test_unknown_option_names_the_known_ones():
    with pytest.raises(ValueError, match=r"window_size.*got 'window'"):
        check_ssim_options(window=11)


def test_defaults_pass():
    options = check_ssim_options()
    assert (options.c1, options.c2) == pytest.approx((1e-4, 9e-4))
    check_ssim_options(window_size=1, k1=0, k2=0.0, alpha=0, scaling="batch", padding="valid")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device_raises():
    with pytest.raises(RuntimeError, match=r"impl='triton'.* CUDA"):
        check_ssim_options(impl="triton")
    with pytest.raises(RuntimeError, match=r"impl='triton'.* cpu"):
        ssim_loss(X, X, impl="triton")


@pytest.mark.parametrize(
    "x,y,options,match",
    [
        (X[0], X, {}, r"input must be a floating point tensor \(N, C, H, W\); got \(3, 8, 8\)"),
        (X, X.long(), {}, "target must be a floating point.*int64"),
        (X, None, {}, "target must be .*NoneType"),
        (X, X[:1], {}, r"same shape; got \(2, 3, 8, 8\) and \(1, 3, 8, 8\)"),
        (X, X, {"mask": torch.ones(2, 8, 8)}, "mask must be bool.*float32"),
        (X, X, {"mask": torch.ones(2, 8, 7) > 0}, r"of shape \(2, 8, 7\)"),
    ],
)
def test_tensors_that_do_not_fit(x, y, options, match):
    with pytest.raises(ValueError, match=match):
        ssim_loss(x, y, **options)


def test_lists_that_do_not_fit():
    with pytest.raises(ValueError, match=r"inputs.* got 0"):
        pyramid_ssim_loss([], [])
    with pytest.raises(ValueError, match=r"level_weights.* 2 .*got 1"):
        pyramid_ssim_loss([X, X], [X, X], level_weights=[1.0])


@needs_compiler
def test_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(select, "_logged", set())
    with caplog.at_level(logging.INFO, logger="ssim_kd"):
        for _ in range(3):
            ssim_loss(X, X)
            ssim_loss(X, X, gamma=2.0)
    assert [r.message.split(":")[0] for r in caplog.records] == ["SSIM loss"] * 2
    assert "'native' on cpu" in caplog.text and "'reference'" in caplog.text
