"""Random options of the distiller: they train, or are refused with a message that names the key."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import (
    TEACHER_FPN,
    build,
    distilled_config,
    make_batch,
    save_weights,
    stock_config,
    train_losses,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

numbers = st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e-6, 1e6, -1.0, math.nan, math.inf])
levels = st.lists(
    st.sampled_from(["p2", "p3", "p4", "p5", "p6", "p7", "res2", "res4", "x"]), max_size=4
)
OPTIONS = {
    "IN_FEATURES": levels,
    "ADAPTER": st.sampled_from(["auto", "always", "none", "1x1"]),
    "SCALING": st.sampled_from(["channel", "sample", "batch", "none", "pixel"]),
    "SCALING_GRAD": st.booleans(),
    "MASK_PADDING": st.booleans(),
    "RESIZE": st.sampled_from(["error", "bilinear", "nearest"]),
    "LEVEL_WEIGHTS": st.lists(numbers, max_size=5),
    "LOSS_WEIGHT": numbers,
    "LOSS": st.sampled_from(["ssim", "l1", "l2", "l3"]),
    "SSIM.WINDOW_SIZE": st.sampled_from([1, 3, 5, 11, 33, 0, 2, -1]),
    "SSIM.SIGMA": numbers,
    "SSIM.K1": numbers,
    "SSIM.K2": numbers,
    "SSIM.DATA_RANGE": numbers,
    "SSIM.ALPHA": numbers,
    "SSIM.BETA": numbers,
    "SSIM.GAMMA": numbers,
    "SSIM.PADDING": st.sampled_from(["same", "valid", "zero"]),
    "SSIM.IMPL": st.sampled_from(["auto", "reference", "eager", "native", "triton", "cuda"]),
    "TEACHER.PRECISION": st.sampled_from(["auto", "float32", "bfloat16", "float16", "int8"]),
    "TEACHER.FOLD_BN": st.booleans(),
    "TEACHER.CHANNELS_LAST": st.booleans(),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    return str(save_weights(stock_config("faster", fpn=TEACHER_FPN), path))


# Few options at a time: with all of them at once hardly any combination would be valid.
choices = st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: OPTIONS[key] for key in keys})
)
counts = {"trained": 0, "refused": 0}


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(options=choices, tiny=st.booleans())
def check(weights: str, options: dict[str, Any], tiny: bool) -> None:
    pairs = [x for key, value in options.items() for x in (f"MODEL.DISTILL.{key}", value)]
    cfg = distilled_config("faster", "faster", weights, *pairs)
    try:
        model = build(cfg)
    except ValueError as error:
        counts["refused"] += 1
        message = str(error)
        named = [key for key in options if key.rsplit(".", 1)[-1].lower() in message.lower()]
        assert "MODEL.DISTILL" in message and named, (options, message)
        return
    losses = train_losses(model, make_batch([(32, 32), (40, 33)] if tiny else ((96, 64), (64, 96))))
    assert torch.isfinite(losses["loss_distill"]), options
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), (options, name)
    counts["trained"] += 1


def test_build_fuzzed_options(weights: str) -> None:
    check(weights)
    print(counts)
    assert counts["trained"] > 20 and counts["refused"] > 20, counts
