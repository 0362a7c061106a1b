"""The autograd node of the SSIM loss: forward computes the gradient, backward multiplies it.

Between forward and backward it keeps one map a level, the gradient for the student's map.

The kernels in ``cpu`` and ``triton`` use this notation, for one cell. G is the windowed mean; s and
t are the means of the planes:

    x' = x - s, y' = y - t                          moments of small numbers lose no digits
    a, b, q, r = G[x'], G[y'], G[x'^2 + y'^2], G[x'y']
    mu_x = a + s, mu_y = b + t                      the paper's means
    A1 = 2 mu_x mu_y + C1     B1 = mu_x^2 + mu_y^2 + C1         l = A1 / B1
    A2 = 2 (r - a b) + C2     B2 = q - a^2 - b^2 + C2           c s = A2 / B2
    S = A1 A2 / (B1 B2)

With beta = gamma only sigma_x^2 + sigma_y^2 is needed, hence four filtered maps instead of five.
The gradient of sum(w S) for x, by the chain rule through a, q and r, with G' the adjoint of G:

    d = 2 w / (B1 B2)
    g_r = d A1,  g_q = -d S B1 / 2,  g_a = d mu_y A2 - b g_r - d S B2 mu_x - 2 a g_q
    gradient = G'[g_a] + 2 x' G'[g_q] + y' G'[g_r]

The kernels use h1 = A1 / 2, h2 = A2 / 2 and S / 4 = h1 h2 / (B1 B2).
Shapes: N images, C channels, H x W cells, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import SSIMOptions, compute_dtype


class LevelInputs(NamedTuple):
    """Arguments of an implementation for one level.

    Args:
        x, y: the maps of student and teacher, (N, C, H, W), detached.
        mask: (N, H, W) bool, True where a cell is valid, or None.
        weights: (N, H, W), the weight of each cell in the loss, or None for 1 / (N C H W).
        need_grad: whether to compute the gradient for ``x``.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None
    weights: Tensor | None
    need_grad: bool


class LevelResult(NamedTuple):
    """Results of an implementation for one level.

    Args:
        value: scalar, the loss.
        grad: (N, C, H, W) in ``grad_dtype`` of the student's map, or None if not needed.
    """

    value: Tensor
    grad: Tensor | None


RunLevels = Callable[[Sequence[LevelInputs], SSIMOptions], list[LevelResult]]


def empty_result(level: LevelInputs) -> LevelResult:
    """The loss 0 of a level without elements."""
    x = level.x
    grad = torch.empty_like(x, dtype=grad_dtype(x)) if level.need_grad else None
    return LevelResult(x.new_zeros((), dtype=compute_dtype(x)), grad)


def grad_dtype(x: Tensor) -> torch.dtype:
    """The type of the saved gradient for ``x``: its own, but float32 for float16.

    Its elements are of the order of 1 / (N C H W) and would underflow in float16, since the loss
    scaler's factor arrives only in backward.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        run: RunLevels,
        levels: Sequence[LevelInputs],
        level_weights: Sequence[float],
        options: SSIMOptions,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            results = run(levels, options)
        values = torch.stack([result.value for result in results])
        total = torch.stack([w * r.value for w, r in zip(level_weights, results, strict=True)])
        ctx.save_for_backward(*(result.grad for result in results))
        ctx.level_weights, ctx.dtypes = level_weights, [x.dtype for x in inputs]
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)
        return total.sum(), values

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ssim_loss has a second derivative (create_graph=True) only with impl='reference'"
            )
        grads: list[Tensor | None] = [None] * 4
        for grad, w, dtype in zip(ctx.saved_tensors, ctx.level_weights, ctx.dtypes, strict=True):
            if grad is None or grad_total is None:
                grads.append(None)
            else:  # with four axes the factor, float32, is not rounded to half precision
                factor = (w * grad_total).view(1, 1, 1, 1)
                grads.append((grad * factor).to(dtype))
        return tuple(grads)


@torch.compiler.disable  # the kernels cannot be traced
def closed_form_loss(
    run: RunLevels,
    levels: Sequence[LevelInputs],
    level_weights: Sequence[float],
    options: SSIMOptions,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over levels (a scalar) and the detached (L,) losses.

    Args:
        run: the implementation.
        levels: maps as the caller has them; ``need_grad`` is set here.
        level_weights: L numbers.
        options: of the loss.
    """
    grad_enabled = torch.is_grad_enabled()
    detached = [
        v._replace(x=v.x.detach(), y=v.y.detach(), need_grad=grad_enabled and v.x.requires_grad)
        for v in levels
    ]
    total, values = _ClosedForm.apply(run, detached, level_weights, options, *(v.x for v in levels))
    return total, values
