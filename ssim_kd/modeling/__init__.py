"""The meta-architecture and its parts."""

from .batch import DistillBatch
from .distiller import DISTILLER_REGISTRY, Distiller
from .feature_distiller import FeatureDistiller
from .meta_arch import DistilledDetector
from .taps import FeatureTap, tappable_levels
from .teacher import FrozenTeacher, load_teacher
from .teacher_config import teacher_config

__all__ = [
    "DISTILLER_REGISTRY",
    "DistillBatch",
    "DistilledDetector",
    "Distiller",
    "FeatureDistiller",
    "FeatureTap",
    "FrozenTeacher",
    "load_teacher",
    "tappable_levels",
    "teacher_config",
]
