"""The names within a DistilledDetector: the plain student's, and the distillers' beside them.

Then checkpoints are those of the student, and what is chosen by name (the learning rate of a ViT's
layers, frozen parameters) is chosen as in the plain student.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

_STUDENT, _DISTILLERS = "student.", "distillers."


def keep_plain_names(model: nn.Module) -> None:
    """Of a model with ``student`` and ``distillers``: in the state dict, read and written."""
    model.register_state_dict_post_hook(_flatten)
    model.register_load_state_dict_pre_hook(_nest)
    model.register_load_state_dict_post_hook(_name_plainly)


def plainly(found: Iterator[tuple[str, nn.Module]], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """What ``named_modules(prefix=prefix)`` found, without "student." in the names.

    The student itself stays "student": the empty name is that of the whole.
    """
    start = f"{prefix}." if prefix else ""
    for name, module in found:
        yield _plain(name, start), module


def _plain(name: str, start: str) -> str:
    nested = start + _STUDENT
    return start + name[len(nested) :] if name.startswith(nested) else name


def _flatten(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [k for k in state if k.startswith(prefix + _STUDENT)]:
        state[_plain(key, prefix)] = state.pop(key)


def _nest(module: Any, state: dict[str, Any], prefix: str, _metadata: Any, *_args: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if not name.startswith((_DISTILLERS, _STUDENT)):
            state[f"{prefix}{_STUDENT}{name}"] = state.pop(key)
    # Weights to start from hold nothing of the distillers, which then keep what they have.
    module._starts = not any(k.startswith(prefix + _DISTILLERS) for k in state)


def _name_plainly(module: Any, incompatible: Any) -> None:
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [
            key.replace(_STUDENT, "", 1)
            for key in keys
            if not (module._starts and _DISTILLERS in key)
        ]
