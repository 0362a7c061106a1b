"""The autograd node of the fast SSIM losses: the gradient is made in forward, in closed form.

All that is kept for backward is one map a level, the gradient for the student; backward multiplies
it by the incoming scalar.
Shapes: N images, C channels, H x W cells, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import compute_dtype
from .options import SSIMOptions


class LevelInputs(NamedTuple):
    """What a fast implementation takes for one level.

    ``x``, ``y``: the maps of student and teacher, (N, C, H, W), detached. ``mask``: (N, H, W) bool
    or None. ``need_grad``: whether to make the gradient for ``x``.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None
    need_grad: bool


class LevelResult(NamedTuple):
    """What it gives.

    ``value``: scalar, the loss. ``grad``: (N, C, H, W) in ``grad_dtype`` of the student's map, or
    None if none was asked for.
    """

    value: Tensor
    grad: Tensor | None


RunLevels = Callable[[Sequence[LevelInputs], SSIMOptions], list[LevelResult]]


def empty_result(level: LevelInputs) -> LevelResult:
    """The result of a level without elements: 0."""
    x = level.x
    grad = torch.empty_like(x, dtype=grad_dtype(x)) if level.need_grad else None
    return LevelResult(x.new_zeros((), dtype=compute_dtype(x)), grad)


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
                "ssim_loss: the fast implementations have no second derivative; "
                "use impl='reference' for create_graph=True"
            )
        grads: list[Tensor | None] = [None] * 4
        for grad, w, dtype in zip(ctx.saved_tensors, ctx.level_weights, ctx.dtypes, strict=True):
            if grad is None or grad_total is None:
                grads.append(None)
            else:
                grads.append(_scaled(grad, w * grad_total, dtype))
        return tuple(grads)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` as ``dtype``, multiplied in the type of ``factor``, the scalar's own.

    In place, which saves a map when memory is at its fullest, if nothing asks for ``grad`` again.
    """
    if grad.dtype == factor.dtype == dtype:
        return grad.mul_(factor) if _is_last_use(factor) else grad * factor
    out = torch.empty_like(grad, dtype=dtype)
    for source, result in zip(grad, out, strict=True):  # sample by sample: a small copy at a time
        torch.mul(source, factor.view(1, 1, 1), out=result)
    return out


def _is_last_use(factor: Tensor) -> bool:
    """Whether this backward pass frees what was saved. False where PyTorch does not tell."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps_graph is None or torch._C._functorch.is_functorch_wrapped_tensor(factor):
        return False  # the latter: a batch of factors (is_grads_batched) needs as many maps
    return not keeps_graph()


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
    levels = [
        LevelInputs(x.detach(), y.detach(), m, torch.is_grad_enabled() and x.requires_grad)
        for x, y, m in zip(inputs, targets, masks, strict=True)
    ]
    total, values = _ClosedForm.apply(run, levels, level_weights, options, *inputs)
    return total, values
