"""The mark of tests that need impl="native"."""

import pytest
import torch

from ssim_kd.ops.options import SSIMOptions
from ssim_kd.ops.select import why_not_native

needs_compiler = pytest.mark.skipif(
    why_not_native("cpu", torch.float32, SSIMOptions()) is not None,
    reason="no C compiler with OpenMP here",
)
NATIVE = pytest.param("native", marks=needs_compiler)
