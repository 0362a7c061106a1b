"""What the losses accept: options and tensors, checked.

Options are checked once, so that a bad value raises when a model is built.
Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PADDINGS = ("same", "valid")
SCOPES = ("channel", "sample", "batch")
IMPLS = ("auto", "reference", "eager", "native", "triton")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ``ValueError`` with ``allowed`` and ``value`` unless ``value`` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    optional: bool = False,
) -> Any:
    """A number as it is, if it is finite and within its bounds.

    Args:
        name: of the argument or key, for the message.
        value: an int or float, no bool.
        least, above, most, below: >=, >, <=, <.
        whole: whether it has to be an int.
        optional: whether it may be None.

    Returns:
        ``value``; a float unless ``whole``.

    Raises:
        ValueError: it is another; the message begins with ``name``.
    """
    if optional and value is None:
        return None
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    bounds = ((">=", least), (">", above), ("<=", most), ("<", below))
    if not (
        number
        and math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    ):
        kind = "whole" if whole else "finite"
        within = " and ".join(f"{sign} {x:g}" for sign, x in bounds if x is not None)
        raise ValueError(f"{name} is {value!r}; expected a {kind} number {within}.")
    return value if whole else float(value)


def check_numbers(name: str, values: Sequence[Any], *, least: int) -> list[int]:
    """Whole numbers >= ``least`` as a list; errors as of :func:`check_number`."""
    return [check_number(name, value, least=least, whole=True) for value in values]


@dataclass(frozen=True)
class SSIMOptions:
    """Everything that shapes the SSIM loss except the tensors. See ``ssim_loss`` for the meanings.

    Raises:
        ValueError: an option is outside its range; the message carries the value.
    """

    window_size: int = 11
    sigma: float = 1.5
    data_range: float = 1.0
    k1: float = 0.01
    k2: float = 0.03
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    padding: str = "same"
    scaling: str | None = None
    scaling_grad: bool = True
    impl: str = "auto"

    def __post_init__(self) -> None:
        size = self.window_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise ValueError(f"window_size is {size!r}; expected a positive odd integer.")
        check_number("sigma", self.sigma, least=1e-3, most=1e6)
        # The bounds keep C1, C2 and their product, of the order of data_range^4, within float32.
        check_number("data_range", self.data_range, least=1e-6, most=1e6)
        for name in ("k1", "k2"):
            check_number(name, getattr(self, name), least=0, most=10)
        for name in ("alpha", "beta", "gamma"):
            check_number(name, getattr(self, name), least=0, most=100)
        check_choice("padding", self.padding, PADDINGS)
        check_choice("scaling", self.scaling, (None, *SCOPES))
        check_choice("scaling_grad", self.scaling_grad, (True, False))
        check_choice("impl", self.impl, IMPLS)

    @property
    def c1(self) -> float:
        """C1 = (K1 L)^2, which steadies the luminance term."""
        return (self.k1 * self.data_range) ** 2

    @property
    def c2(self) -> float:
        """C2 = (K2 L)^2, which steadies contrast and structure."""
        return (self.k2 * self.data_range) ** 2

    @property
    def eps(self) -> float:
        """Added to the product of the denominators, as kornia does; scales as data_range^4."""
        return 1e-12 * self.data_range**4

    @property
    def plain_exponents(self) -> bool:
        """True for the paper's default alpha = beta = gamma = 1, the case with a closed form."""
        return self.alpha == self.beta == self.gamma == 1.0

    def crop(self, height: int, width: int) -> int:
        """Cells cut from each side of an H x W map: 0, or the window's radius for "valid".

        A map smaller than the window has no "valid" cell. It is treated as "same", so that a small
        pyramid level keeps its gradient.
        """
        fits = min(height, width) >= self.window_size
        return self.window_size // 2 if self.padding == "valid" and fits else 0


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 maps, else float32: half precision is too coarse for a variance."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_maps(input: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` unless both are floating (N, C, H, W) maps of one shape and device."""
    for name, x in (("input", input), ("target", target)):
        check_map(name, x)
    if input.shape != target.shape:
        raise ValueError(
            "input and target must have the same shape; "
            f"got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if input.device != target.device:
        raise ValueError(
            f"input and target must be on the same device; got {input.device} and {target.device}"
        )


def check_map(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is a floating point tensor (N, C, H, W)."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating point tensor (N, C, H, W); got {got}")


def check_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``mask`` as (N, H, W) bool on the device of ``x``, or raise ``ValueError``."""
    if mask is None:
        return None
    n, _, h, w = x.shape
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((n, h, w), (n, 1, h, w)):
        raise ValueError(
            f"mask must be bool of shape {(n, h, w)} or {(n, 1, h, w)}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask must be on the map's device, {x.device}; got {mask.device}")
    return mask.reshape(n, h, w)
