"""The meta-architecture and its parts."""

from ..ops.options import check_number, check_numbers
from .adapters import build_adapters
from .distillers import (
    DISTILLER_REGISTRY,
    DenseHeadDistiller,
    DistillBatch,
    Distiller,
    LevelMaps,
    LpDistiller,
    PyramidDistiller,
    RCNNHeadDistiller,
    RoIHeadDistiller,
    SSIMDistiller,
    build_distillers,
    part_keys,
    resolved_config,
)
from .loaded_teacher import LoadedTeacher
from .meta_arch import DistilledDetector
from .norms import CellBatchNorm
from .plain_names import unwrap
from .taps import Call, Tap, tappable_levels
from .teacher import FrozenTeacher
from .teacher_config import TeacherSource, teacher_name, teacher_source
from .teacher_files import find_teacher
from .timm_backbone import TimmBackbone

__all__ = [
    "DISTILLER_REGISTRY",
    "Call",
    "CellBatchNorm",
    "DenseHeadDistiller",
    "DistillBatch",
    "DistilledDetector",
    "Distiller",
    "FrozenTeacher",
    "LevelMaps",
    "LoadedTeacher",
    "LpDistiller",
    "PyramidDistiller",
    "RCNNHeadDistiller",
    "RoIHeadDistiller",
    "SSIMDistiller",
    "Tap",
    "TeacherSource",
    "TimmBackbone",
    "build_adapters",
    "build_distillers",
    "check_number",
    "check_numbers",
    "find_teacher",
    "part_keys",
    "resolved_config",
    "tappable_levels",
    "teacher_name",
    "teacher_source",
    "unwrap",
]
