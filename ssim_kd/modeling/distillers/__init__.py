"""Distillers: the terms of the distillation loss."""

from .base import DISTILLER_REGISTRY, DistillBatch, Distiller, build_distillers
from .checks import check_number
from .dense_heads import DenseHeadDistiller
from .lp import LpDistiller
from .parts import PartsDistiller
from .pyramid import LevelMaps, PyramidDistiller
from .roi_heads import RCNNHeadDistiller
from .ssim import FeatureDistiller, SSIMDistiller

__all__ = [
    "DISTILLER_REGISTRY",
    "DenseHeadDistiller",
    "DistillBatch",
    "Distiller",
    "FeatureDistiller",
    "LevelMaps",
    "LpDistiller",
    "PartsDistiller",
    "PyramidDistiller",
    "RCNNHeadDistiller",
    "SSIMDistiller",
    "build_distillers",
    "check_number",
]
