"""Taps: the feature maps of a detector by the name of their level."""

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch.utils.hooks import RemovableHandle


def _sources(model: Any) -> list[Any]:
    """The modules whose outputs are maps by level: the backbone, and what an FPN stands on."""
    backbone = model.backbone
    bottom_up = getattr(backbone, "bottom_up", None)
    return [backbone] if bottom_up is None else [backbone, bottom_up]


def tappable_levels(model: Any) -> dict[str, ShapeSpec]:
    """Every level of a detector that can be tapped.

    Args:
        model: a detector with a Detectron2 ``backbone``.

    Returns:
        channels and stride (in input pixels) by level, e.g. p2..p6 of an FPN and the res2..res5
        below it.
    """
    levels: dict[str, ShapeSpec] = {}
    for source in _sources(model):
        for name, shape in source.output_shape().items():
            levels.setdefault(name, shape)
    return levels


class FeatureTap:
    """Collects the maps of some levels while it is entered, and lets go of them after.

    A context manager: the forward hooks live inside the ``with`` block alone, so that no
    activation outlives a training step and the tapped model stays as it was.

        with FeatureTap(model, ["p3", "res5"]) as features:
            model(batched_inputs)
        features["p3"]                                   # (N, C, H, W)
    """

    def __init__(self, model: Any, levels: list[str]) -> None:
        """
        Args:
            model: a detector with a Detectron2 ``backbone``.
            levels: names of levels, each in :func:`tappable_levels`.
        """
        self._by_source: list[tuple[Any, list[str]]] = []
        missing = list(levels)
        for source in _sources(model):
            found = [name for name in missing if name in source.output_shape()]
            missing = [name for name in missing if name not in found]
            if found:
                self._by_source.append((source, found))
        if missing:
            raise ValueError(f"Levels {missing} are not among {list(tappable_levels(model))}.")
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> dict[str, torch.Tensor]:
        features: dict[str, torch.Tensor] = {}
        for source, names in self._by_source:

            def collect(_module: Any, _inputs: Any, output: Any, names: list[str] = names) -> None:
                features.update({name: output[name] for name in names})

            self._handles.append(source.register_forward_hook(collect))
        return features

    def __exit__(self, *_exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
