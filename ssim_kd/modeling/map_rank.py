"""How many directions of its channels a teacher's maps use, for ``--eval-teacher``."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: After so many the rank is logged. It moves little with more.
IMAGES = 64


def effective_rank(maps: list[Tensor]) -> float:
    """The effective rank of a level's channels over all cells, from 1 to C.

    The exponential of the entropy of the spectrum of the channels' covariance (Roy & Vetterli,
    EUSIPCO 2007): C if all directions vary alike, near 1 if one of them does almost all of it.

    Args:
        maps: (N, C, H, W) each; H and W may differ.

    Example:
        >>> effective_rank([torch.tensor([[[[0.0, 1.0]], [[0.0, 2.0]]]])])
        1.0
    """
    cells = torch.cat([m.detach().double().transpose(0, 1).flatten(1) for m in maps], dim=1)
    values = torch.linalg.eigvalsh(torch.atleast_2d(torch.cov(cells))).clamp_min(0)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return round(float(torch.special.entr(shares).sum().exp()), 6)


def log_ranks(model: nn.Module) -> None:
    """Log the effective rank of each level of a model's backbone once it has seen IMAGES images.

    A model without a ``backbone`` that returns maps by level is left as it is.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return
    seen: dict[str, list[Tensor]] = {}

    def look(_module: nn.Module, _inputs: Any, maps: Any) -> None:
        if not isinstance(maps, dict):
            handle.remove()
            return
        for level, found in maps.items():
            # Every 4th cell of large maps, which are alike: memory stays small.
            step = 4 if min(found.shape[-2:]) > 64 else 1
            seen.setdefault(level, []).append(found[..., ::step, ::step].cpu())
        if sum(len(m) for m in next(iter(seen.values()))) >= IMAGES:
            handle.remove()
            ranks = ", ".join(
                f"{level} {effective_rank(found):.1f} of {found[0].shape[1]}"
                for level, found in seen.items()
            )
            logger.info(
                "Effective rank of the teacher's maps, over %d images: %s channels. A level of low "
                "rank may harm: leave it out of MODEL.DISTILL.IN_FEATURES.",
                IMAGES,
                ranks,
            )
            seen.clear()

    handle = backbone.register_forward_hook(look)
