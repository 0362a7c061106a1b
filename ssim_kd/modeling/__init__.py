"""The meta-architecture and its parts."""

from .distillers import (
    DISTILLER_REGISTRY,
    DenseHeadDistiller,
    DistillBatch,
    Distiller,
    FeatureDistiller,
    LevelMaps,
    LpDistiller,
    PyramidDistiller,
    RCNNHeadDistiller,
    SSIMDistiller,
    build_distillers,
)
from .meta_arch import DistilledDetector
from .taps import Call, Tap, tappable_levels
from .teacher import FrozenTeacher, load_detector
from .teacher_config import TeacherSource, find_teacher, teacher_config, teacher_source

__all__ = [
    "DISTILLER_REGISTRY",
    "Call",
    "DenseHeadDistiller",
    "DistillBatch",
    "DistilledDetector",
    "Distiller",
    "FeatureDistiller",
    "FrozenTeacher",
    "LevelMaps",
    "LpDistiller",
    "PyramidDistiller",
    "RCNNHeadDistiller",
    "SSIMDistiller",
    "Tap",
    "TeacherSource",
    "build_distillers",
    "find_teacher",
    "load_detector",
    "tappable_levels",
    "teacher_config",
    "teacher_source",
]
