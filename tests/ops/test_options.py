"""Options and tensors that do not fit: the error has the key and the value."""

import pytest
import torch

from ssim_kd.losses import SSIMLoss, check_ssim_options, pyramid_ssim_loss, ssim_loss

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
def test_ssim_options_out_of_range(name, values):
    for value in values:
        for function in (check_ssim_options, SSIMLoss, lambda **o: ssim_loss(X, X, **o)):
            with pytest.raises(ValueError, match=name) as error:
                function(**{name: value})
            assert repr(value) in str(error.value)


def test_check_ssim_options_unknown_option():
    with pytest.raises(ValueError, match=r"'window'; expected one of 'window_size'"):
        check_ssim_options(window=11)


def test_ssim_options_defaults_and_limits():
    options = check_ssim_options()
    assert (options.c1, options.c2) == pytest.approx((1e-4, 9e-4))
    check_ssim_options(window_size=1, k1=0, k2=0.0, alpha=0, scaling="batch", padding="valid")


@pytest.mark.parametrize(
    "x,y,options,parts",
    [
        (X[0], X, {}, ("input", "(3, 8, 8)")),
        (X, X.long(), {}, ("target", "int64")),
        (X, None, {}, ("target", "NoneType")),
        (X, X[:1], {}, ("input", "target", "(2, 3, 8, 8)", "(1, 3, 8, 8)")),
        (X, X.to("meta"), {}, ("input", "target", "cpu", "meta")),
        (X, X, {"mask": torch.ones(2, 8, 8)}, ("mask", "float32")),
        (X, X, {"mask": torch.ones(2, 8, 7) > 0}, ("mask", "(2, 8, 7)")),
        (X, X, {"mask": torch.ones(2, 8, 8, device="meta") > 0}, ("mask", "cpu", "meta")),
    ],
)
def test_check_maps_and_mask_bad_input(x, y, options, parts):
    with pytest.raises(ValueError) as error:
        ssim_loss(x, y, **options)
    assert all(part in str(error.value) for part in parts)


def test_pyramid_ssim_loss_bad_lists():
    with pytest.raises(ValueError, match=r"inputs.* got 0"):
        pyramid_ssim_loss([], [])
    with pytest.raises(ValueError, match=r"level_weights.* 2 .*got 1"):
        pyramid_ssim_loss([X, X], [X, X], level_weights=[1.0])
