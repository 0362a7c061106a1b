"""Choice of the implementation that computes the SSIM loss."""

from __future__ import annotations

import logging

from torch import Tensor

from .options import SSIMOptions

logger = logging.getLogger(__name__)
_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)


def require_triton() -> None:
    """Raise ``RuntimeError`` unless the Triton implementation can be had."""
    raise RuntimeError("impl='triton' is not available yet")


def choose_impl(x: Tensor, options: SSIMOptions) -> str:
    """The implementation for maps like ``x``: an explicit choice as it is, "auto" resolved."""
    if options.impl != "auto":
        return options.impl
    _say_once("SSIM loss: impl 'auto' takes 'reference'")
    return "reference"
