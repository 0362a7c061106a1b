"""The names within a DistilledDetector: the plain student's, and the distillers' next to them.

Then checkpoints are those of the student, and what is chosen by name (the learning rate of a ViT's
layers, frozen parameters) is chosen as in the plain student.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.names import leave_out, leave_out_compiled
from .inherit import inherit_in_training

_STUDENT, _DISTILLERS = "student.", "distillers."


class LikeStudent(nn.Module):
    """A model with ``student`` and ``distillers`` that looks like its student.

    Its submodules have the names that they have there; attributes that it lacks are the student's;
    and ``isinstance`` takes it for the student's class as well.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Each module, by its name in the plain student, or below "distillers."."""
        inherit_in_training(self)
        # The student itself stays "student": the empty name is that of the whole.
        start = f"{prefix}." if prefix else ""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            nested = start + _STUDENT
            yield start + name[len(nested) :] if name.startswith(nested) else name, module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get("_modules", {}).get("student")
            if student is None:
                raise
            return getattr(student, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # As proxies do: type() gives DistilledDetector, and isinstance() is true for both.
        student = self.__dict__.get("_modules", {}).get("student")
        return type(self) if student is None else type(student)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        # As it is, pickle takes no object whose __class__ is not its type.
        inherit_in_training(self)
        return _blank, (type(self),), self.__dict__


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


def keep_plain_names(model: nn.Module) -> None:
    """Of a model with ``student`` and ``distillers``: in the state dict, read and written."""
    leave_out_compiled(model)
    leave_out(model, "student", beside=_DISTILLERS)
    model.register_load_state_dict_pre_hook(_note_start)
    model.register_load_state_dict_post_hook(_excuse_start)


def _note_start(module: Any, state: dict[str, Any], prefix: str, *_args: Any) -> None:
    # Weights to start from hold nothing of the distillers, which then keep what they have.
    module._starts = not any(k.startswith(prefix + _DISTILLERS) for k in state)


def _excuse_start(module: Any, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not (module._starts and _DISTILLERS in key)]


def unwrap(model: nn.Module) -> nn.Module:
    """A detector without what wraps it: ``DistributedDataParallel``, ``torch.compile``."""
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._orig_mod)
        else:
            return model
