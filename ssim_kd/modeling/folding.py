"""Folding: a frozen batch norm behind a convolution becomes part of the convolution."""

from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn


def fold_batch_norms(module: nn.Module) -> int:
    """Fold every batch norm of Detectron2's ``Conv2d`` layers into their weights, in place.

    A batch norm that will never be trained again is one multiplication and one addition a
    channel, which the convolution before it can do by the way. Other norms are left as they are.

    Args:
        module: in eval mode, not to be trained again.

    Returns:
        the number of norms that were folded.
    """
    folded = 0
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
            _fold(conv, norm)
            folded += 1
    return folded


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
    # In double precision, so that folding itself rounds once.
    mean, variance, weight, bias = (
        tensor.double() for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = weight * (variance + norm.eps).rsqrt()
    dtype = conv.weight.dtype
    before = 0.0 if conv.bias is None else conv.bias.double()
    conv.bias = nn.Parameter(((before - mean) * scale + bias).to(dtype), requires_grad=False)
    conv.weight.copy_((conv.weight.double() * scale[:, None, None, None]).to(dtype))
    conv.norm = None
