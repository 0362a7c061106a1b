"""Taps: outputs of a detector's backbone by level, or the calls of any of its submodules.

Those of a training step are checked, and summed to see whether they are finite.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torch.utils.hooks import RemovableHandle


class Call(NamedTuple):
    """One call of a tapped submodule: its positional arguments and what it returned."""

    inputs: tuple[Any, ...]
    output: Any


def _level_sources(model: Any) -> list[Any]:
    """The modules that return maps by level: the backbone, and what an FPN stands on."""
    backbone = getattr(model, "backbone", None)
    bottom_up = getattr(backbone, "bottom_up", None)
    return [m for m in (backbone, bottom_up) if hasattr(m, "output_shape")]


def tappable_levels(model: Any) -> dict[str, ShapeSpec]:
    """Every level of a detector that can be tapped.

    Args:
        model: a detector with a Detectron2 ``backbone``.

    Returns:
        channels and stride (in input pixels) by level, e.g. p2..p6 of an FPN and the res2..res5
        below it. Empty for a model without such a backbone.
    """
    levels: dict[str, ShapeSpec] = {}
    for source in _level_sources(model):
        for name, shape in source.output_shape().items():
            levels.setdefault(name, shape)
    return levels


class Tap:
    """Collects outputs of a model while it is entered.

    A context manager: the forward hooks live inside the ``with`` block only, so that no activation
    outlives a training step and the tapped model stays as it was.

        with Tap(model, ["p3", "roi_heads.box_predictor"]) as outputs:
            model(batched_inputs)
        outputs["p3"]                                    # the map (N, C, H, W) of a level
        outputs["roi_heads.box_predictor"][0].output     # the first call of a submodule
    """

    def __init__(self, model: nn.Module | Any, names: Sequence[str]) -> None:
        """
        Args:
            model: a detector.
            names: each a level in :func:`tappable_levels`, or the path of a submodule such as
                "head" or "roi_heads.box_pooler". A submodule can be called more than once in a
                forward (a head that all levels share): its calls are collected in their order.

        Raises:
            ValueError: a name that is neither.
        """
        self._levels: list[tuple[Any, list[str]]] = []
        rest = list(dict.fromkeys(names))
        for source in _level_sources(model):
            found = [name for name in rest if name in source.output_shape()]
            rest = [name for name in rest if name not in found]
            if found:
                self._levels.append((source, found))
        modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        missing = [name for name in rest if not name or name not in modules]
        if missing:
            raise ValueError(
                f"{missing} are neither among the levels {list(tappable_levels(model))} of "
                f"{type(model).__name__} nor paths of its submodules."
            )
        self._modules = {name: modules[name] for name in rest}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> dict[str, Any]:
        outputs: dict[str, Any] = {name: [] for name in self._modules}
        for source, names in self._levels:

            def collect(_module: Any, _inputs: Any, output: Any, names: list[str] = names) -> None:
                outputs.update({name: output[name] for name in names})

            self._handles.append(source.register_forward_hook(collect))
        for name, module in self._modules.items():

            def append(_module: Any, inputs: Any, output: Any, name: str = name) -> None:
                outputs[name].append(Call(inputs, output))

            self._handles.append(module.register_forward_hook(append))
        return outputs

    def __exit__(self, *_exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def level_maps(outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The maps of levels among the outputs of a :class:`Tap`; calls of submodules are left out."""
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def check_features(student: nn.Module, distillers: Sequence[Any], ours: Mapping[str, Any]) -> None:
    """Check what a training step has tapped of the student.

    Args:
        student: whose forward has run.
        distillers: with their ``student_taps``.
        ours: the tapped outputs by name.

    Raises:
        ValueError: an output that is missing, or a distiller whose levels have no gradient.
    """
    missing = {name for d in distillers for name in d.student_taps if not len(ours.get(name, ()))}
    if missing:
        raise ValueError(
            f"The forward of the student {type(student).__name__} gives no output of "
            f"{sorted(missing)}: it does not call these modules, or calls .forward() of them, "
            "which skips hooks. Expected module(x), as self.backbone(images.tensor)."
        )
    maps = level_maps(dict(ours)) if torch.is_grad_enabled() else {}
    for d in distillers:
        levels = [name for name in d.student_taps if name in maps]
        if levels and not any(maps[name].requires_grad for name in levels):
            raise ValueError(
                f"The student's features {levels} have no gradient, so that {d.name} would "
                "teach it nothing. Expected levels of which a part is trained "
                "(MODEL.BACKBONE.FREEZE_AT), and no activation checkpointing of the whole "
                "backbone by use_reentrant=True, which hides them from autograd."
            )


def feature_sums(**outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One scalar a level and model, finite if its features are."""
    return {
        f"{whose} features {level}": maps.detach().sum(dtype=torch.float32)
        for whose, found in outputs.items()
        for level, maps in level_maps(found).items()
    }
