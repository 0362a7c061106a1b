"""The Triton kernels compile ahead of time, without a GPU, for sm_80 and sm_90."""

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ssim_kd.ops.triton import plane_kernels, ssim_kernels  # noqa: E402

FLOATS = {"uniform_weight", "c1", "c2", "eps", "min_range", "noise"}
MAPS = {"x": "*bf16", "y": "*bf16", "grad": "*bf16", "valid_cells": "*u8"}
TABLES = {
    "weights", "planes", "ranges", "row_in", "row_out", "column_in", "column_out", "scratch",
    "partial", "sums",
}  # fmt: skip
FILTER = {"K": 11, "BLOCK": 128}
TILE = {"CB": 1, "BLOCK": 1024, "MASKED": True}
VARIANTS = [
    (ssim_kernels.moments_kernel,
     {**FILTER, "GRAD": True, "WEIGHTED": True, "CHANNELS_LAST": False}),
    (ssim_kernels.gradient_kernel, {**FILTER, "SUMS": True, "CHANNELS_LAST": True}),
    (plane_kernels.range_kernel, {**TILE, "SCALED": True}),
    (plane_kernels.range_kernel, {**TILE, "CB": 32, "BLOCK": 32, "SCALED": False}),
    (plane_kernels.extrema_kernel, TILE),
]  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel,constants", VARIANTS, ids=lambda v: getattr(v, "__name__", ""))
def test_kernels_compile(kernel, constants, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if capability == 80 and "K" in constants:
        constants = {**constants, "K": 3}  # An unrolled window of 11 takes long.
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = MAPS.get(name, "*fp32" if name in TABLES else "i32")
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}
    )
    assert f".target sm_{capability}" in compiled.asm["ptx"]
