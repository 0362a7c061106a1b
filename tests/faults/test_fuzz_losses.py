"""Arguments of any kind: the losses give a value, or refuse with their own message.

That finite maps give finite values and gradients: tests/ops/test_implementations.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssim_kd.losses import lp_loss, minmax_scale, ssim_loss

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

DTYPES = [*(torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.int64, torch.bool]
sizes = st.lists(st.integers(0, 12), min_size=0, max_size=5)
shapes = st.one_of(st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(0, 12)] * 2).map(list), sizes)
fills = st.sampled_from([0.0, 1.0, -3.0, 1e4, 1e30, math.inf, -math.inf, math.nan, None])


@st.composite
def maps(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    shape = draw(shapes)
    other = draw(st.one_of(st.just(shape), shapes))
    made = []
    for size in (shape, other):
        dtype, fill = draw(st.sampled_from(DTYPES)), draw(fills)
        value = torch.rand(size) if fill is None else torch.full(size, fill)
        made.append(value.nan_to_num().to(dtype) if dtype in DTYPES[4:] else value.to(dtype))
    mask = draw(st.sampled_from([None, "fits", "none valid", "other"]))
    cells = [*shape[:1], *shape[2:]] if mask != "other" else draw(sizes)
    return *made, None if mask is None else torch.full(cells, mask != "none valid")


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    maps=maps(),
    loss=st.sampled_from(["ssim", "l1", "l2", "scale"]),
    scaling=st.sampled_from([None, "channel", "sample", "batch"]),
    window=st.sampled_from([1, 3, 11]),
    padding=st.sampled_from(["same", "valid"]),
)
def test_losses_fuzzed(maps, loss, scaling, window, padding) -> None:
    x, y, mask = maps
    if x.is_floating_point():
        x.requires_grad_()
    try:
        if loss == "ssim":
            options = {"window_size": window, "padding": padding}
            value = ssim_loss(x, y, scaling=scaling, mask=mask, **options)
        elif loss == "scale":
            value = minmax_scale(x, scope=scaling or "channel", mask=mask).float().sum()
        else:
            value = lp_loss(x, y, p=int(loss[1]), scaling=scaling, mask=mask)
    except ValueError as error:
        assert str(error)
        return
    assert value.shape == ()
    value.backward()
    assert x.grad is not None and x.grad.shape == x.shape
    usable = x.numel() and x.isfinite().all() and y.isfinite().all()
    # Unscaled, SSIM needs fourth powers and l2 squares.
    largest = 1e6 if loss == "ssim" else 1e15
    if usable and (scaling or max(m.double().abs().max() for m in (x, y)) <= largest):
        assert value.isfinite() and x.grad.isfinite().all()
