"""State dicts whose keys leave out the name of a wrapper."""

from functools import partial
from typing import Any

from torch import nn


def leave_out(module: nn.Module, child: str, *, beside: str = "") -> None:
    """Leave a child's name out of the keys of a module's state dict, written and read.

    Args:
        module: whose state dict has "child.x" as "x".
        child: its name.
        beside: start of the keys that are not the child's.
    """
    inner = f"{child}."
    # Functions and no closures: the module can be pickled.
    module.register_state_dict_post_hook(partial(_flatten, inner=inner))
    module.register_load_state_dict_pre_hook(partial(_nest, inner=inner, beside=beside))
    module.register_load_state_dict_post_hook(partial(_shorten, inner=inner))


def leave_out_compiled(model: nn.Module) -> None:
    """Name what ``torch.compile`` wraps in a model as without it; again changes nothing."""
    for module in model.modules():
        if "_orig_mod" in module._modules:
            leave_out(module, "_orig_mod")


def _flatten(
    _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, *, inner: str
) -> None:
    start = prefix + inner
    for key in [k for k in state if k.startswith(start)]:
        state[prefix + key[len(start) :]] = state.pop(key)


def _nest(
    _module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, inner: str, beside: str
) -> None:
    kept = (prefix + inner, prefix + beside) if beside else (prefix + inner,)
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(kept)]:
        state[prefix + inner + key[len(prefix) :]] = state.pop(key)


def _shorten(_module: nn.Module, incompatible: Any, *, inner: str) -> None:
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [key.replace(inner, "", 1) for key in keys]
