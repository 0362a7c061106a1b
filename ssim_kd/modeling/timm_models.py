"""What is asked of timm: a model's levels, and weights that are read without running code."""

import difflib
import inspect
import math
import sys
from typing import Any

from ..checkpoint import local_file

# Arguments of timm.create_model that name what it loads.
_LOADING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}


def import_timm(key: str) -> Any:
    """The package timm.

    Args:
        key: of the config that asks for it, for the message.

    Raises:
        ImportError: it is not installed, or is so old that weights may run code.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{key} asks for a model of timm, which is not installed: pip install 'ssim_kd[timm]'."
        ) from error
    # Before 1.0.26 timm unpickled files, and what it found at a name of the hub.
    if not inspect.signature(timm.models.load_state_dict).parameters["weights_only"].default:
        raise ImportError(
            f"{key} asks for a model of timm, and timm {timm.__version__} runs the code that a "
            "file of weights holds: expected 1.0.26 or later, pip install 'ssim_kd[timm]'."
        )
    return timm


def check_options(options: dict[str, Any] | None, *, key: str) -> dict[str, Any]:
    """Further arguments of ``timm.create_model``; they may load nothing.

    Args:
        options: by name; None for none.
        key: of the config that gives them, for the message.

    Raises:
        ValueError: one of them names a file or other weights.
    """
    refused = sorted(_LOADING & set(options or {}))
    if refused:
        raise ValueError(
            f"{key} has {refused}, which load weights; expected arguments of the architecture. "
            "PRETRAINED (WEIGHTS of VFM) names the weights."
        )
    return dict(options or {})


def levels_of(timm: Any, name: str, arguments: dict[str, Any]) -> dict[str, int]:
    """The index in timm of each level of a model, which is built to be asked."""
    try:
        model = timm.create_model(name, features_only=True, **arguments)
    except Exception as error:
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, of which timm {timm.__version__} makes no pyramid of "
            f"features with {arguments}: {type(error).__name__}: {error}. Near it are {near}; "
            "timm.list_models() has all."
        ) from error
    strides = model.feature_info.reduction()
    if len(set(strides)) < len(strides) or any(s < 1 or s & (s - 1) for s in strides):
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, whose maps have the strides {strides}; expected a "
            "pyramid, each stride another power of 2."
        )
    indices = model.feature_info.out_indices
    return {f"res{int(math.log2(s))}": i for s, i in zip(strides, indices, strict=True)}


def checked_overlay(
    timm: Any,
    name: str,
    pretrained: str,
    arguments: dict[str, Any],
    *,
    key: str = "MODEL.TIMM.PRETRAINED",
) -> dict[str, Any]:
    """What timm is asked to load: its ``pretrained_cfg_overlay``.

    Args:
        timm: the package.
        name, arguments: of ``timm.create_model``.
        pretrained: "timm", or a file of the whole model, its classifier aside.
        key: of the config that names it, for the message.

    Raises:
        ValueError: a file that is not there, not readable, or of another model.
    """
    if pretrained == "timm":
        return {}
    path = local_file(pretrained, key=key)
    model = timm.create_model(name, **arguments)
    try:
        tensors = timm.models.load_state_dict(path)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        tensors = convert(tensors, model) if convert else tensors
    except Exception as error:
        raise ValueError(
            f"{key} is {pretrained!r}, which timm cannot read as weights of "
            f"{name} ({type(error).__name__}: {error})."
        ) from error
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    heads = tuple(f"{head}." for head in heads)
    expected = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(heads)}
    given = {k: v.shape for k, v in tensors.items() if not k.startswith(heads)}
    unfit = sorted(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
    if unfit:
        raise ValueError(
            f"{key} is {pretrained!r}, which does not fit {name}: {len(unfit)} of "
            f"{len(expected)} tensors are missing, unexpected or of another shape (e.g. "
            f"{unfit[:3]}). Expected weights of this very model."
        )
    return {"file": path}
