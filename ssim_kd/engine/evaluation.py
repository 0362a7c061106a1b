"""Evaluation: of the student as it will be deployed, and of the teacher by itself."""

import functools
import inspect
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from torch import nn

from ..checkpoint import StudentCheckpointer, load_strictly, read_weights
from ..config import student_config
from ..data.needs import num_classes, num_classes_key
from ..modeling import TeacherSource, classes, teacher_name, teacher_source
from ..modeling.map_rank import log_ranks
from .coco_evaluation import build_coco_evaluator

logger = logging.getLogger(__name__)


def build_evaluator(cfg: CfgNode, name: str, folder: str | None = None) -> DatasetEvaluator:
    """The evaluator of a data set, by the ``evaluator_type`` of its metadata.

    COCO evaluation takes Detectron2's compiled implementation if there is one, and pycocotools
    elsewhere.

    Args:
        cfg: with ``OUTPUT_DIR``.
        name: of a registered data set.
        folder: for its results; ``OUTPUT_DIR/inference`` by default.

    Raises:
        ValueError: a data set whose type has no evaluator.
    """
    folder = folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    # LVIS's own limit is 300.
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    limits = {"max_dets_per_image": limit} if limit > 300 else {}
    coco = functools.partial(build_coco_evaluator, cfg, name, folder)
    semantic = functools.partial(SemSegEvaluator, name, output_dir=folder)
    kinds: dict[str, Callable[[], DatasetEvaluator]] = {
        "cityscapes_instance": lambda: CityscapesInstanceEvaluator(name),
        "coco": coco,
        "coco_panoptic_seg": lambda: DatasetEvaluators(
            [semantic(), coco(), COCOPanopticEvaluator(name, folder)]
        ),
        "lvis": lambda: LVISEvaluator(name, output_dir=folder, **limits),
        "pascal_voc": lambda: PascalVOCDetectionEvaluator(name),
        "sem_seg": semantic,
    }
    if kind not in kinds:
        raise ValueError(
            f"The data set {name!r} has evaluator_type {kind!r}; expected one of "
            f"{', '.join(kinds)}."
        )
    return kinds[kind]()


def student_for_evaluation(cfg: CfgNode, *, resume: bool) -> tuple[CfgNode, nn.Module]:
    """Build only the student, with weights that fit it to the last key. No teacher is touched.

    Args:
        cfg: the config of the training.
        resume: take the last checkpoint of ``OUTPUT_DIR`` if there is one, not MODEL.WEIGHTS.

    Raises:
        ValueError: no weights, or weights that do not fit.
    """
    cfg = student_config(cfg)
    model = build_model(cfg)
    folder = cfg.OUTPUT_DIR if resume else ""
    load_for_evaluation(model, cfg.MODEL.WEIGHTS, key="MODEL.WEIGHTS", folder=folder)
    return cfg, model


def load_for_evaluation(model: nn.Module, path: str, *, key: str, folder: str) -> None:
    """Load weights that fit a student to the last key.

    Args:
        model: the student.
        path: of its weights.
        key: that names them in the config.
        folder: of a training, whose last checkpoint is taken if there is one; "" for ``path``.

    Raises:
        ValueError: no weights, or weights that do not fit.
    """
    newest = StudentCheckpointer(model, folder).newest() if folder else None
    if newest:
        path, key = newest, f"the last checkpoint of {folder}"
    if not path:
        raise ValueError(f"{key} is empty; --eval-only expects the weights to evaluate.")
    load_strictly(model, read_weights(path, key=key))


def teacher_for_evaluation(cfg: CfgNode) -> tuple[CfgNode, nn.Module]:
    """Build the whole teacher, heads included, to be evaluated on the student's data.

    The config of a YAML teacher is its own, except DATASETS, DATALOADER, OUTPUT_DIR and the
    device. A LazyConfig teacher is evaluated at the student's image size.

    Raises:
        ValueError: its classes are not those of the data, or it cannot be built or loaded.
    """
    source = teacher_source(cfg)
    check_teachers_classes(cfg, source)
    teacher = cfg.clone() if source.cfg is None else source.cfg.clone()
    teacher.defrost()
    teacher.DATASETS = cfg.DATASETS.clone()
    teacher.DATALOADER = cfg.DATALOADER.clone()
    teacher.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    model, _ = source.load()
    if source.cfg is None:
        _check_equal_classes(cfg, classes.num_classes(model))
        teacher.INPUT.FORMAT = getattr(model, "input_format", None) or "BGR"
    teacher.freeze()
    log_ranks(model)
    return teacher, model.to(cfg.MODEL.DEVICE)


def check_teachers_classes(cfg: CfgNode, teacher: TeacherSource) -> None:
    """Compare the number of classes that a YAML teacher predicts with the student's, the data's.

    That of a LazyConfig is known only once it is built.

    Raises:
        ValueError: they differ, or only its feature path is built (RT-DETR): it can teach, but not
            be scored.
    """
    if teacher.read is not None:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.NAME is {teacher.name!r}, a teacher of features only: "
            "evaluate it by its own library. Set MODEL.DISTILL.TEACHER.EXPECTED_AP to 0, and leave "
            "--eval-teacher out."
        )
    if teacher.cfg is not None:
        _check_equal_classes(cfg, num_classes(teacher.cfg))


def _check_equal_classes(cfg: CfgNode, own: int | None) -> None:
    data = num_classes(cfg)
    if own is not None and data is not None and own != data:
        raise ValueError(
            f"MODEL.DISTILL.TEACHER.NAME is {teacher_name(cfg)!r}, a "
            f"teacher of {own} classes, but the student and its data have {data} "
            f"({num_classes_key(cfg)}): its AP on DATASETS.TEST cannot be computed. It can be "
            "learned from all the same: set MODEL.DISTILL.TEACHER.EXPECTED_AP to 0, and leave "
            "--eval-teacher out."
        )


def box_ap(results: Mapping[str, Any]) -> float:
    """The box AP of an evaluation, of the first data set if there are several; NaN for none.

    Args:
        results: by task, or by data set if there are several.
    """
    first = results if "bbox" in results else next(iter(results.values()), {})
    boxes = first.get("bbox") if isinstance(first, Mapping) else None
    return float(boxes.get("AP", math.nan)) if isinstance(boxes, Mapping) else math.nan


def build_tta_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Detectron2's wrapper for test-time augmentation.

    Raises:
        ValueError: the student is of a kind that it does not serve.
    """
    try:
        return GeneralizedRCNNWithTTA(cfg, model)
    except AssertionError as error:
        raise ValueError(
            f"TEST.AUG.ENABLED is True, but test-time augmentation is not available for this "
            f"student: {error}. Expected TEST.AUG.ENABLED False, or a GeneralizedRCNN without "
            "keypoints or precomputed proposals."
        ) from error


def test_time_augmentation(cfg: CfgNode, model: nn.Module, trainer: Any) -> OrderedDict:
    """Evaluate with ``TEST.AUG``, as Detectron2's train_net.py does; keys get the suffix _TTA.

    Args:
        cfg: of the student.
        model: the student.
        trainer: whose ``build_evaluator`` and ``test`` evaluate. One that takes no
            ``output_folder`` gets a config whose OUTPUT_DIR is the folder.
    """
    logger.info("Running inference with test-time augmentation ...")
    model = build_tta_model(cfg, model)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
    if "output_folder" in inspect.signature(trainer.build_evaluator).parameters:
        evaluators = [
            trainer.build_evaluator(cfg, n, output_folder=folder) for n in cfg.DATASETS.TEST
        ]
    else:
        own = cfg.clone()
        own.defrost()
        own.OUTPUT_DIR = folder
        evaluators = [trainer.build_evaluator(own, name) for name in cfg.DATASETS.TEST]
    results = trainer.test(cfg, model, evaluators)
    return OrderedDict({f"{key}_TTA": value for key, value in results.items()})
