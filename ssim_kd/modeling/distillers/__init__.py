"""Distillers: the terms of the distillation loss."""

from .base import DISTILLER_REGISTRY, Distiller, part_keys
from .batch import DistillBatch
from .build import bind_distillers, build_distillers, resolved_config
from .dense_heads import DenseHeadDistiller
from .lp import LpDistiller
from .pyramid import LevelMaps, PyramidDistiller
from .roi_heads import RCNNHeadDistiller, RoIHeadDistiller
from .ssim import SSIMDistiller

__all__ = [
    "DISTILLER_REGISTRY",
    "DenseHeadDistiller",
    "DistillBatch",
    "Distiller",
    "LevelMaps",
    "LpDistiller",
    "PyramidDistiller",
    "RCNNHeadDistiller",
    "RoIHeadDistiller",
    "SSIMDistiller",
    "bind_distillers",
    "build_distillers",
    "part_keys",
    "resolved_config",
]
