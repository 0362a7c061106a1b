"""Loading weights into a model: all of them or none."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from .files import Weights
from .names import leave_out_compiled

logger = logging.getLogger(__name__)

# Keys that a complete checkpoint may lack, or have in addition: constants of the config,
# anchors of old checkpoints, counters that inference does not read.
_TOLERATED = ("pixel_mean", "pixel_std", "anchor_generator.cell_anchors", "num_batches_tracked")
# A message names at most so many keys.
_NAMED = 5


def load_strictly(model: nn.Module, weights: Weights, *, feature_path: str = "") -> list[str]:
    """Load weights into a model, all of them or none.

    Args:
        model: what the weights were trained for.
        weights: from :func:`read_weights`.
        feature_path: prefix of the keys that must fit; "" for all. Other keys may differ
            (the heads of a teacher), as long as the file does hold a detector.

    Returns:
        the keys outside the feature path that did not fit.

    Raises:
        ValueError: a key that is missing, unexpected, of another shape, not finite, or an
            all-zero convolution; the model is unchanged.
    """
    if weights.backbone_only:
        raise ValueError(
            f"{weights.key} is {weights.path!r}, the file of an ImageNet backbone; expected that "
            "of a trained detector."
        )
    leave_out_compiled(model)
    expected = {k: v for k, v in model.state_dict().items() if not _tolerated(k)}
    given = {k: v for k, v in weights.tensors.items() if not _tolerated(k)}
    missing = [k for k in expected if k not in given]
    unexpected = [k for k in given if k not in expected]
    misshaped = [k for k in expected if k in given and expected[k].shape != given[k].shape]
    problems = {
        "missing": [k for k in missing if k.startswith(feature_path)],
        "unexpected": [k for k in unexpected if k.startswith(feature_path)],
        "of another shape": [k for k in misshaped if k.startswith(feature_path)],
    }
    if any(problems.values()):
        raise ValueError(
            f"{weights.key} is {weights.path!r}, which does not fit {type(model).__name__} as its "
            f"config describes it: {_describe(problems, expected, given)}. Expected the weights of "
            "this very architecture; check the config next to them, and --data."
        )
    fitting = {k: v for k, v in given.items() if k in expected and k not in misshaped}
    if not any(not k.startswith(feature_path) for k in fitting) and feature_path:
        raise ValueError(
            f"{weights.key} is {weights.path!r}, which holds only a backbone; expected a trained "
            "detector, heads included."
        )
    _check_values(weights, fitting)
    model.load_state_dict(fitting, strict=False)
    others = [k for k in (*missing, *unexpected, *misshaped) if not k.startswith(feature_path)]
    if others:
        logger.warning(
            "%s is %r, of which %d keys other than %s* are not as in its config (e.g. %s): "
            "other heads or classes. Only its features are used.",
            weights.key,
            weights.path,
            len(others),
            feature_path,
            others[0],
        )
    return others


def _tolerated(key: str) -> bool:
    return any(part in key for part in _TOLERATED)


def _describe(problems: dict[str, list[str]], expected: Mapping, given: Mapping) -> str:
    parts = []
    for what, keys in problems.items():
        if keys:
            named = [
                f"{k} {tuple(given[k].shape)} for {tuple(expected[k].shape)}"
                if k in given and k in expected
                else k
                for k in keys[:_NAMED]
            ]
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            parts.append(f"{len(keys)} keys {what} ({', '.join(named)}{more})")
    return "; ".join(parts) + f"; {len(expected)} keys expected, {len(given)} in the file"


def _check_values(weights: Weights, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{weights.key} is {weights.path!r}, whose {name} holds NaN or Inf: the file is "
                "damaged or its training diverged."
            )
        if value.dim() == 4 and value.numel() and not value.any():
            raise ValueError(
                f"{weights.key} is {weights.path!r}, whose convolution {name} is all zeros: these "
                "are not trained weights."
            )
