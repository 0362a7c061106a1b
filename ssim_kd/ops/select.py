"""Choice of the implementation of the SSIM loss."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import eager
from .autograd import RunLevels
from .cpu import launch as cpu
from .options import SSIMOptions, check_choice

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def _log_once(message: str, level: int = logging.INFO) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.log(level, message)


def _interpreted() -> bool:
    """True if Triton interprets its kernels on a CPU; set before Triton's import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _triton_module() -> ModuleType | str:
    """The module of the Triton kernels, or why it is not available. Imported on first use."""
    try:
        module = importlib.import_module(".triton.launch", __package__)
        if not _interpreted():
            from triton.runtime import driver

            driver.active.get_current_target()  # needs a C compiler and Python's headers
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # anything that a compiler or a driver raises
        return f"Triton cannot launch a kernel ({error})"
    return module


def why_not_triton(device: str, dtype: torch.dtype, options: SSIMOptions) -> str | None:
    """Why impl="triton" is not available for maps of this device type and dtype, or None."""
    if device != "cuda" and not _interpreted():
        return f"it needs a CUDA or ROCm device; the maps are on {device}"
    module = _triton_module()
    if isinstance(module, str):
        return module
    return _beyond_kernels(dtype, options, module.MAX_WINDOW)


def why_not_native(device: str, dtype: torch.dtype, options: SSIMOptions) -> str | None:
    """Why impl="native" is not available for maps of this device type and dtype, or None."""
    if device != "cpu":
        return f"it needs a CPU; the maps are on {device}"
    beyond = _beyond_kernels(dtype, options, cpu.MAX_WINDOW)
    return beyond or cpu.why_not_built(options.window_size)


def _beyond_kernels(dtype: torch.dtype, options: SSIMOptions, max_window: int) -> str | None:
    if dtype == torch.float64:
        return "it computes in float32; the maps are float64"
    if options.window_size > max_window:
        return f"window_size must be at most {max_window}; got {options.window_size}"
    return None


WHY_NOT = {"triton": why_not_triton, "native": why_not_native}
FASTEST = {"cuda": "triton", "cpu": "native"}  # by device type; "eager" on any other


def _raise_unavailable(impl: str, reason: str) -> None:
    raise RuntimeError(f"impl='{impl}' is not available: {reason}; use impl='auto'")


def check_ssim_options(**options: Any) -> SSIMOptions:
    """Check the keyword options of ``ssim_loss`` without a tensor, as a constructor needs it.

    Returns:
        the options with defaults filled in.

    Raises:
        ValueError: a value out of range, an unknown choice or an unknown option.
        RuntimeError: the implementation that ``impl`` names is not available on this machine.
    """
    for name in options:
        check_choice("an option of ssim_loss", name, tuple(SSIMOptions.__dataclass_fields__))
    checked = SSIMOptions(**options)
    impl, device = checked.impl, "cpu"
    if impl == "triton" and not _interpreted():
        if not torch.cuda.is_available():
            _raise_unavailable(impl, "no CUDA or ROCm device was found")
        device = "cuda"
    if impl in WHY_NOT:
        reason = WHY_NOT[impl](device, torch.float32, checked)
        if reason is not None:
            _raise_unavailable(impl, reason)
    return checked


@torch.compiler.disable  # a graph has no place for compilers and drivers
def choose_impl(inputs: Sequence[Tensor], options: SSIMOptions) -> RunLevels | None:
    """The implementation for these maps; None stands for the reference.

    Raises:
        RuntimeError: the implementation that ``options.impl`` names is not available.
    """
    device, impl = inputs[0].device.type, options.impl
    if impl == "reference":
        return None
    if not options.plain_exponents:
        _log_once("SSIM loss: using 'reference', the only one with exponents other than 1")
        return None
    name = FASTEST.get(device, "eager") if impl == "auto" else impl
    if name in WHY_NOT:
        reasons = (WHY_NOT[name](x.device.type, x.dtype, options) for x in inputs)
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None and impl != "auto":
            _raise_unavailable(impl, reason)
        if reason is not None:
            message = f"SSIM loss: using 'eager' on {device}, '{name}' is not available: {reason}"
            _log_once(message, logging.WARNING)
            return eager.run_levels
    if impl == "auto":
        _log_once(f"SSIM loss: using '{name}' on {device}")
    if name == "eager":
        return eager.run_levels
    module = cpu if name == "native" else _triton_module()
    assert not isinstance(module, str)
    run: RunLevels = module.run_levels
    return run
