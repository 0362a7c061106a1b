"""The mark of tests that need impl="native"."""

import pytest
import torch

from ssim_kd.ops import ssim_native
from ssim_kd.ops.options import SSIMOptions

needs_compiler = pytest.mark.skipif(
    ssim_native.why_not("cpu", torch.float32, SSIMOptions()) is not None,
    reason="no C compiler with OpenMP here",
)
NATIVE = pytest.param("native", marks=needs_compiler)
