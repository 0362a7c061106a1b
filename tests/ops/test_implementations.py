"""All implementations have the reference's values and gradients; accuracy; fuzzing."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssim_kd.losses import pyramid_ssim_loss, ssim_loss
from ssim_kd.ops import eager
from tests.native import NATIVE, needs_compiler

SHAPES = [(1, 1, 1, 1), (2, 2, 1, 7), (3, 2, 3, 3), (2, 5, 7, 7), (2, 3, 13, 21), (1, 2, 50, 70)]
SCALINGS = [(None, True), ("channel", True), ("channel", False), ("sample", True), ("batch", True)]
# Value and relative gradient; half precision rounds the gradient itself.
TOLERANCE = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1e-6, 1e-2),
    torch.float16: (1e-6, 2e-3),
}

EAGER_TYPES = [("eager", dtype) for dtype in TOLERANCE]
NATIVE_TYPES = [  # float64 raises: test_select.py
    pytest.param("native", dtype, marks=needs_compiler)
    for dtype in TOLERANCE
    if dtype != torch.float64
]
FLOAT_MAX = torch.finfo(torch.float32).max


def value_and_grad(x, y, **options):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = ssim_loss(x, y, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def check(impl, shape, dtype, scaling, scaling_grad, masked, window_size=11):
    """Compare ``impl`` with the reference; masked cases are channels-last and "valid" as well."""
    g = torch.Generator().manual_seed(sum(shape))
    x, y = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    x.view(-1)[:3] = x.max()  # ties for the maximum
    mask = None
    if masked:
        mask = torch.rand(shape[0], *shape[2:], generator=g) > 0.3
        x, y = (m.contiguous(memory_format=torch.channels_last) for m in (x, y))
    options = {
        "scaling": scaling,
        "scaling_grad": scaling_grad,
        "mask": mask,
        "window_size": window_size,
        "padding": "valid" if masked else "same",
    }
    expected, expected_grad = value_and_grad(x, y, impl="reference", **options)
    loss, grad = value_and_grad(x, y, impl=impl, **options)
    assert grad.dtype == dtype and loss.dtype == expected.dtype
    for_value, for_grad = TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected, atol=for_value, rtol=0)
    error = (grad.double() - expected_grad.double()).norm()
    assert error <= for_grad * expected_grad.double().norm() + 1e-12, (shape, options, error)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 40, 19)])
@pytest.mark.parametrize("impl,dtype", [*EAGER_TYPES, *NATIVE_TYPES])
def test_implementations_equal_reference(impl, shape, dtype):
    for (scaling, scaling_grad), masked in itertools.product(SCALINGS, (False, True)):
        check(impl, shape, dtype, scaling, scaling_grad, masked)


@pytest.mark.parametrize("scaling", [None, "channel", "sample", "batch"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("planes", [1, 2, 6])
def test_eager_in_chunks_equals_reference(monkeypatch, planes, scaling, masked):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(3, 3, 6, 40, generator=g).double() for _ in range(2))
    mask = torch.rand(3, 6, 40, generator=g) > 0.3 if masked else None
    monkeypatch.setattr(eager, "CHUNK_BYTES", planes * 6 * 40 * 4)
    for size in (1, 25):
        options = {"window_size": size, "sigma": 4.0, "scaling": scaling, "mask": mask}
        expected = value_and_grad(x, y, impl="reference", **options)
        result = value_and_grad(x, y, impl="eager", **options)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("impl", ["reference", "eager", NATIVE])
@pytest.mark.parametrize("offset,spread", [(0.5, 1.0), (0.5, 1e-3), (10.0, 1e-2)])
def test_float32_gradient_is_within_1e_6_of_float64(impl, offset, spread):
    g = torch.Generator().manual_seed(0)
    x, y = (offset + spread * torch.rand(2, 4, 40, 50, generator=g) for _ in range(2))
    exact, exact_grad = value_and_grad(x.double(), y.double(), impl="reference")
    loss, grad = value_and_grad(x, y, impl=impl)
    assert abs(loss.double() - exact) < 1e-6
    assert (grad.double() - exact_grad).norm() < 1e-6 * exact_grad.norm()


@pytest.mark.parametrize("impl", ["reference", "eager", NATIVE])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(0, 2)] * 2, *[st.integers(0, 9)] * 2),
    dtype=st.sampled_from(list(TOLERANCE)),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e4, 1e6, 1e20, 1e38]),
    flat=st.booleans(),
    scaling=st.sampled_from([None, "channel", "sample", "batch"]),
    k=st.sampled_from([0.0, 0.01]),
    seed=st.integers(0, 99),
)
def test_ssim_loss_of_finite_maps_is_finite(impl, shape, dtype, magnitude, flat, scaling, k, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(shape, generator=g).double() - 0.5 for _ in range(2))
    if flat:
        y = y * 0 + 1
    largest = torch.finfo(dtype).max if scaling else min(torch.finfo(dtype).max, 1e6)
    x, y = ((m * magnitude * 4).clamp(-largest, largest).to(dtype) for m in (x, y))
    mask = torch.rand(shape[0], *shape[2:], generator=g) > 0.2
    if impl == "native" and dtype == torch.float64:
        dtype = torch.float32
        x, y = (m.clamp(-FLOAT_MAX, FLOAT_MAX).to(dtype) for m in (x, y))
    options = {"scaling": scaling, "mask": mask, "k1": k, "impl": impl}
    loss, grad = value_and_grad(x, y, **options)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "eager", NATIVE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ssim_loss_of_non_finite_maps_is_not_finite(impl, bad):
    x, y = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 6, 6)
    x[0, 0, 2, 2] = bad
    assert not ssim_loss(x, y, impl=impl).isfinite()


# The interpreter takes its time for each cell of the window.
TRITON_CASES = [
    ((1, 1, 1, 1), torch.float32, None, True, False, 5),
    ((2, 2, 1, 7), torch.float32, "channel", True, True, 5),
    ((2, 2, 3, 3), torch.float32, "batch", True, False, 3),
    ((1, 2, 7, 7), torch.bfloat16, "sample", True, True, 5),
    ((2, 2, 13, 12), torch.float32, "channel", True, False, 11),
    ((1, 2, 12, 13), torch.float16, None, True, True, 3),
    ((1, 1, 5, 9), torch.float32, "channel", False, True, 5),
]


def test_triton_in_the_interpreter_equals_reference():
    """In a separate process: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_on_a_device_equals_reference(shape):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=g).cuda() for _ in range(2))
    for scaling, scaling_grad in SCALINGS:
        options = {"scaling": scaling, "scaling_grad": scaling_grad}
        expected = value_and_grad(x, y, impl="reference", **options)
        torch.testing.assert_close(
            value_and_grad(x, y, impl="triton", **options), expected, atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("impl", ["eager", NATIVE])
def test_pyramid_ssim_loss_level_weights(impl):
    check_level_weights(impl)


def check_level_weights(impl):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.rand(1, 2, size, 5, generator=g).requires_grad_() for size in (6, 3)]
    targets = [torch.rand(x.shape, generator=g) for x in inputs]
    expected, actual = (
        pyramid_ssim_loss(inputs, targets, level_weights=[2.0, -0.5], impl=i)
        for i in ("reference", impl)
    )
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(total, inputs) for total, _ in (actual, expected)]
    torch.testing.assert_close(*grads, atol=1e-7, rtol=1e-5)


def _interpreted() -> None:
    from ssim_kd.ops.triton import launch

    for case in TRITON_CASES:
        check("triton", *case)
    check_level_weights("triton")
    launch.SMALL_SCRATCH = 0  # then channels go in groups, as on large maps
    for scaling, masked in ((None, False), ("channel", True)):
        check("triton", (2, 4, 6, 5), torch.float32, scaling, True, masked, 3)
    for magnitude, scaling in ((1e6, None), (1e38, "channel")):
        big = torch.full((1, 1, 3, 3), magnitude)
        big[0, 0, 1, 1] *= -2
        loss, grad = value_and_grad(big, -big, impl="triton", scaling=scaling)
        assert loss.isfinite() and grad.isfinite().all()
        torch.testing.assert_close(loss, ssim_loss(big, -big, impl="reference", scaling=scaling))
    empty = torch.zeros(0, 2, 3, 3)
    assert value_and_grad(empty, empty, impl="triton")[0] == 0


if __name__ == "__main__":
    _interpreted()
