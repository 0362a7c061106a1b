"""Distillers: the terms of the distillation loss."""

from .base import DISTILLER_REGISTRY, DistillBatch, Distiller, build_distillers
from .heads import DenseHeadDistiller, RCNNHeadDistiller
from .lp import LpDistiller
from .pyramid import LevelMaps, PyramidDistiller
from .ssim import FeatureDistiller, SSIMDistiller

__all__ = [
    "DISTILLER_REGISTRY",
    "DenseHeadDistiller",
    "DistillBatch",
    "Distiller",
    "FeatureDistiller",
    "LevelMaps",
    "LpDistiller",
    "PyramidDistiller",
    "RCNNHeadDistiller",
    "SSIMDistiller",
    "build_distillers",
]
