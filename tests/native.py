"""The mark of tests that need impl="native"."""

import pytest
import torch

from ssim_kd.ops.dispatch import WHY_NOT
from ssim_kd.ops.options import SSIMOptions

needs_compiler = pytest.mark.skipif(
    WHY_NOT["native"]("cpu", torch.float32, SSIMOptions()) is not None,
    reason="no C compiler with OpenMP here",
)
NATIVE = pytest.param("native", marks=needs_compiler)
