"""Choice of the implementation that computes the SSIM loss."""

from __future__ import annotations

import logging

from torch import Tensor

from . import ssim_eager
from .closed_form import RunLevels
from .options import SSIMOptions

logger = logging.getLogger(__name__)
_said: set[str] = set()

FAST: dict[str, RunLevels] = {"eager": ssim_eager.run_levels}


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)


def require_triton() -> None:
    """Raise ``RuntimeError`` unless the Triton implementation can be had."""
    raise RuntimeError("impl='triton' is not available yet")


def choose_impl(x: Tensor, options: SSIMOptions) -> str:
    """The implementation for maps like ``x``: an explicit choice as it is, "auto" resolved.

    Raises:
        RuntimeError: the explicit choice cannot be had.
    """
    if options.impl == "triton":
        require_triton()
    if options.impl != "reference" and not options.plain_exponents:
        _say_once("SSIM loss: exponents other than 1 have no fast form, taking impl 'reference'")
        return "reference"
    if options.impl != "auto":
        return options.impl
    _say_once(f"SSIM loss: impl 'auto' takes 'eager' on {x.device.type}")
    return "eager"
