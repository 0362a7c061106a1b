"""Choice of the implementation that computes the SSIM loss."""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import ssim_eager, ssim_native
from .closed_form import RunLevels
from .options import SSIMOptions

logger = logging.getLogger(__name__)
_said: set[str] = set()


def _say_once(message: str, level: int = logging.INFO) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def _interpreted() -> bool:
    """Triton runs its kernels in Python, on a CPU, if this was set before its import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _triton_module() -> ModuleType | str:
    """The module of the Triton kernels, or why there is none. Imported on first use only."""
    try:
        module = importlib.import_module(".ssim_triton", __package__)
        if not _interpreted():
            from triton.runtime import driver

            driver.active.get_current_target()  # needs a C compiler and Python's headers
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # whatever a compiler or a driver may raise
        return f"Triton cannot launch a kernel ({error})"
    return module


def _why_not_triton(device: str, dtype: torch.dtype, options: SSIMOptions) -> str | None:
    if device != "cuda" and not _interpreted():
        return f"the maps are on {device}, and it needs a CUDA or ROCm device"
    module = _triton_module()
    if isinstance(module, str):
        return module
    return _beyond_kernels(dtype, options, module.MAX_WINDOW)


def _why_not_native(device: str, dtype: torch.dtype, options: SSIMOptions) -> str | None:
    if device != "cpu":
        return f"the maps are on {device}, and it is for a CPU"
    beyond = _beyond_kernels(dtype, options, ssim_native.MAX_WINDOW)
    return beyond or ssim_native.why_not_built(options.window_size)


def _beyond_kernels(dtype: torch.dtype, options: SSIMOptions, max_window: int) -> str | None:
    """What our kernels cannot serve: they compute in float32, with the window's rows at hand."""
    if dtype == torch.float64:
        return "float64 maps"
    if options.window_size > max_window:
        return f"a window larger than {max_window}"
    return None


# Device type, maps' type and options -> why the implementation cannot be had, or None.
WHY_NOT = {"triton": _why_not_triton, "native": _why_not_native}
FASTEST = {"cuda": "triton", "cpu": "native"}  # by device type; "eager" on any other


def _refuse(impl: str, reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"impl='{impl}' cannot be had: {reason}; use impl='auto'")


def require_impl(options: SSIMOptions) -> None:
    """Raise ``RuntimeError`` unless the choice ``options.impl`` can be had on this machine."""
    device = "cpu"
    if options.impl == "triton" and not _interpreted():
        if not torch.cuda.is_available():
            _refuse("triton", "there is no CUDA or ROCm device")
        device = "cuda"
    if options.impl in WHY_NOT:
        _refuse(options.impl, WHY_NOT[options.impl](device, torch.float32, options))


@torch.compiler.disable  # compilers and drivers are asked here, which is not for a graph
def choose_impl(inputs: list[Tensor], options: SSIMOptions) -> RunLevels | None:
    """The fast implementation for these levels, or None for the reference.

    Raises:
        RuntimeError: the explicit choice cannot be had.
    """
    device, impl = inputs[0].device.type, options.impl
    if impl == "reference":
        return None
    if not options.plain_exponents:
        _say_once("SSIM loss: exponents other than 1 have no fast form, taking impl 'reference'")
        return None
    name = FASTEST.get(device, "eager") if impl == "auto" else impl
    why_not = None
    if name in WHY_NOT:
        whys = (WHY_NOT[name](x.device.type, x.dtype, options) for x in inputs)
        why_not = next(filter(None, whys), None)
    if impl != "auto":
        _refuse(impl, why_not)
    elif why_not is None:
        _say_once(f"SSIM loss: impl 'auto' takes '{name}' on {device}")
    else:
        said = f"SSIM loss: impl 'auto' takes 'eager' on {device}, '{name}' cannot be had: "
        _say_once(said + why_not, logging.WARNING)
        name = "eager"
    module = {"eager": ssim_eager, "native": ssim_native}.get(name) or _triton_module()
    assert not isinstance(module, str)
    run: RunLevels = module.run_levels
    return run
