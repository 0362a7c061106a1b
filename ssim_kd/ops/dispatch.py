"""Choice of the implementation that computes the SSIM loss."""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import ssim_eager
from .closed_form import RunLevels
from .options import SSIMOptions

logger = logging.getLogger(__name__)
_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)


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


def _why_not_triton(x: Tensor, options: SSIMOptions) -> str | None:
    if x.device.type != "cuda" and not _interpreted():
        return f"the maps are on {x.device.type}, and it needs a CUDA or ROCm device"
    module = _triton_module()
    return module if isinstance(module, str) else module.why_not(x, options)


def _refuse_triton(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"impl='triton' cannot be had: {reason}; use impl='auto'")


def require_triton(options: SSIMOptions) -> None:
    """Raise ``RuntimeError`` unless Triton can serve ``options`` on this machine."""
    if not torch.cuda.is_available() and not _interpreted():
        _refuse_triton("there is no CUDA or ROCm device")
    module = _triton_module()
    _refuse_triton(module if isinstance(module, str) else module.why_not(torch.empty(0), options))


def choose_impl(inputs: list[Tensor], options: SSIMOptions) -> RunLevels | None:
    """The fast implementation for these levels, or None for the reference.

    Raises:
        RuntimeError: the explicit choice cannot be had.
    """
    if options.impl == "triton":
        for x in inputs:
            _refuse_triton(_why_not_triton(x, options))
    if options.impl == "reference":
        return None
    if not options.plain_exponents:
        _say_once("SSIM loss: exponents other than 1 have no fast form, taking impl 'reference'")
        return None
    device = inputs[0].device.type
    name = options.impl
    if name == "auto":
        why_not = next(filter(None, (_why_not_triton(x, options) for x in inputs)), None)
        name = "triton" if device == "cuda" and why_not is None else "eager"
        because = f" ({why_not})" if device == "cuda" and why_not is not None else ""
        _say_once(f"SSIM loss: impl 'auto' takes '{name}' on {device}{because}")
    if name == "eager":
        return ssim_eager.run_levels
    module = _triton_module()
    assert not isinstance(module, str)
    run: RunLevels = module.run_levels
    return run
