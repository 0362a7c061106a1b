"""The autograd node of the fast SSIM losses: the gradient is made in forward, in closed form.

All that is kept for backward is one map a level, the gradient for the student; backward multiplies
it by the incoming scalar. Shapes: N images, C channels, H x W cells, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import SSIMOptions


class LevelResult(NamedTuple):
    """What a fast implementation gives for one level.

    ``value``: scalar, the loss. ``grad``: (N, C, H, W) in ``grad_dtype`` of the student's map, or
    None if none was asked for.
    """

    value: Tensor
    grad: Tensor | None


# (input, target, mask, options, need_grad) of every level -> results
RunLevels = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence["Tensor | None"], SSIMOptions, Sequence[bool]],
    list[LevelResult],
]


def grad_dtype(x: Tensor) -> torch.dtype:
    """The type in which the gradient for ``x`` waits for backward.

    That of ``x``, but float32 for float16: before the loss scaler's factor comes in, elements of
    the order of 1 / (N C H W) would underflow.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        run: RunLevels,
        targets: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        level_weights: Sequence[float],
        options: SSIMOptions,
        need_grad: Sequence[bool],
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            results = run(inputs, targets, masks, options, need_grad)
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
                "ssim_loss: the fast implementations have no second derivative; "
                "use impl='reference' for create_graph=True"
            )
        grads: list[Tensor | None] = [None] * 6
        for grad, w, dtype in zip(ctx.saved_tensors, ctx.level_weights, ctx.dtypes, strict=True):
            use = grad is not None and grad_total is not None
            grads.append(_scaled(grad, w * grad_total, dtype) if use else None)
        return tuple(grads)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` as ``dtype``, multiplied in the type of ``factor``, the scalar's own.

    Never in place: the graph may be retained and run backward again.
    """
    if grad.dtype == factor.dtype == dtype:
        return grad * factor
    out = torch.empty_like(grad, dtype=dtype)
    for source, result in zip(grad, out, strict=True):  # sample by sample: a small copy at a time
        torch.mul(source, factor.view(1, 1, 1), out=result)
    return out


@torch.compiler.disable  # its kernels are not to be traced, and write where tracing forbids it
def closed_form_loss(
    run: RunLevels,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    level_weights: Sequence[float],
    options: SSIMOptions,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over levels (a scalar) and the detached (L,) losses, by the implementation
    ``run``. Gradients are made only for inputs that need one."""
    targets = [target.detach() for target in targets]
    need_grad = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    return _ClosedForm.apply(run, targets, masks, level_weights, options, need_grad, *inputs)
