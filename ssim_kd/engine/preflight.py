"""What is checked before the first step, so that no run finds it out later.

:func:`check_config`: values, before anything is read; :func:`check_start`: the weights to start
from; :func:`check_evaluation`: all that the evaluations of a training need, which may lie hours
ahead.
"""

import argparse
import contextlib
import filecmp
import importlib.util
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import detection_checkpoint
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..checkpoint import checkpoints_in, local_file, read_file
from ..command_line import is_evaluation
from ..config_loading import AddConfig, load_yaml, value_of
from ..data import Needs
from ..data.mapper import check_image_files
from ..modeling import teacher_name
from ..modeling.classes import num_classes
from ..trackers import check_trackers
from .evaluation import box_ap
from .settings import Settings

logger = logging.getLogger(__name__)

_WEIGHTS = "MODEL.WEIGHTS"
# Packages that Detectron2's evaluators import when an evaluation ends, by evaluator_type.
_PACKAGES = {
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
    "coco_panoptic_seg": "panopticapi",
    "lvis": "lvis",
}
#: The keys of the settings of a training.
KEYS = {
    "output_dir": "OUTPUT_DIR",
    "max_iter": "SOLVER.MAX_ITER",
    "seed": "SEED",
    "weights": _WEIGHTS,
    "weights_partial": "MODEL.WEIGHTS_PARTIAL",
    "amp": "SOLVER.AMP.ENABLED",
    "accumulate": "SOLVER.ACCUMULATE",
    "max_skipped_steps": "SOLVER.MAX_SKIPPED_STEPS",
    "grace_period": "SOLVER.GRACE_PERIOD",
    "checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
    "checkpoints_to_keep": "SOLVER.CHECKPOINTS_TO_KEEP",
    "eval_period": "TEST.EVAL_PERIOD",
    "image_format": "INPUT.FORMAT",
    "vis_period": "VIS_PERIOD",
    "expected_ap": "MODEL.DISTILL.TEACHER.EXPECTED_AP",
    "report": "TEST.REPORT",
}
_NAMES = {
    "teacher": "MODEL.DISTILL.TEACHER",
    "teacher_weights": "MODEL.DISTILL.TEACHER.WEIGHTS",
}


@contextlib.contextmanager
def named(keys: str) -> Iterator[None]:
    """Name the keys that are read inside in errors of Detectron2's that do not.

    Args:
        keys: config keys, for the message.

    Raises:
        ValueError: for a ValueError, KeyError, AssertionError or TypeError.
    """
    try:
        yield
    except (ValueError, KeyError, AssertionError, TypeError) as error:
        if re.search(r"[A-Z]+\.[A-Z_]{2,}", str(error)):
            raise
        raise ValueError(f"{keys}: {type(error).__name__}: {error}") from error


def load_config(args: argparse.Namespace, add_config: AddConfig | None = None) -> CfgNode:
    """The YAML config of a command line, frozen and checked.

    Raises:
        ValueError: see :func:`load_yaml` and :func:`check_config`.
    """
    cfg: CfgNode = load_yaml(args, add_config).cfg
    check_config(cfg, evaluate=is_evaluation(args))
    return cfg


def check_config(cfg: CfgNode, *, evaluate: bool) -> None:
    """Check the values whose errors would come late or would not name the key.

    Args:
        cfg: the whole config.
        evaluate: whether it is evaluated with, and nothing is trained.

    Raises:
        ValueError: naming the key, its value and what is expected.
    """
    distill = cfg.MODEL.DISTILL
    name = cfg.MODEL.META_ARCHITECTURE
    if distill.ENABLED and teacher_name(cfg) and name != "DistilledDetector":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {name!r}, which has no teacher, but "
            "MODEL.DISTILL.TEACHER.NAME names one. Expected 'DistilledDetector', and "
            f"{name!r} as MODEL.DISTILL.STUDENT_META_ARCHITECTURE; or MODEL.DISTILL.ENABLED False."
        )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but no GPU is available; expected a machine "
            "with one, or MODEL.DEVICE cpu."
        )
    if evaluate:
        return
    settings_of(cfg)
    check_trackers(cfg)


def check_tested(cfg: CfgNode) -> None:
    """Raise ValueError without a data set to evaluate on."""
    if not cfg.DATASETS.TEST:
        raise ValueError(
            "DATASETS.TEST is (): there is nothing to evaluate on; expected at least one data set "
            "name."
        )


def settings_of(cfg: CfgNode, **names: str) -> Settings:
    """The settings of a YAML config.

    Args:
        cfg: the whole config.
        names: what further parts of the training are called, for messages.

    Raises:
        ValueError: a value out of its range; names the key.
    """

    precise = cfg.TEST.PRECISE_BN
    more = {"precise_bn": precise.NUM_ITER if precise.ENABLED else 0, "language": "YAML"}
    more["test_sets"] = cfg.DATASETS.TEST
    settings = Settings.read(partial(value_of, cfg), KEYS, {**_NAMES, **names}, **more)
    return settings if cfg.MODEL.DISTILL.ENABLED else replace(settings, expected_ap=0.0)


def check_start(settings: Settings, *, resume: bool) -> None:
    """Fetch and read what the student starts from.

    Args:
        settings: of a training.
        resume: whether a checkpoint is taken instead if there is one.

    Raises:
        ValueError: it is missing, cannot be fetched or cannot be read.
    """
    # Of any kind: which one is whole is the checkpointer's to tell.
    resumes = resume and checkpoints_in(settings.output_dir)
    if settings.weights and not resumes:
        read_file(_without_options(settings.weights), key=settings.key("weights"))


def check_evaluation(cfg: CfgNode, trainer: Any, *, own_loader: bool) -> None:
    """Build every evaluator, and look for every file that the evaluations will read.

    Args:
        cfg: of a training.
        trainer: whose ``build_evaluator`` builds the evaluators.
        own_loader: whether images are read by Detectron2's mapper, so that "file_name" of a record
            is a path.

    Raises:
        ValueError: an evaluator that cannot be built, or a package that it will import is missing;
            results of a task that is not evaluated are expected.
        FileNotFoundError: a file is missing; names the set and how many are.
    """
    for name in cfg.DATASETS.TEST:
        where = f"DATASETS.TEST: data set {name!r}"
        kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
        package = _PACKAGES.get(kind)
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{where} is scored by the package {package!r} (evaluator_type {kind!r}), which is "
                "not installed; expected it, or another data set."
            )
        try:
            trainer.build_evaluator(cfg, name)
        except NotImplementedError:
            logger.warning("%s has no evaluator: it is not scored.", where)
        except Exception as error:
            raise ValueError(f"{where}: its evaluator cannot be built: {error}") from error
        if own_loader:
            records = DatasetCatalog.get(name)
            if isinstance(records, list):
                check_image_files(where, records)
    _check_expected_results(cfg)


def check_class_count(student: torch.nn.Module, classes: Sequence[str], *, key: str) -> None:
    """Check that a built student of any architecture predicts every class of its data.

    Args:
        student: as it is trained.
        classes: of the data; () if they are not known.
        key: that names the training sets, for the message.

    Raises:
        ValueError: it predicts fewer.
    """
    count = num_classes(student)
    if count is not None and count < len(classes):
        raise ValueError(
            f"{key} has {len(classes)} categories, but the student, a {type(student).__name__}, "
            f"predicts {count}: it would learn {list(classes[count:])[:5]} as background. Expected "
            f"num_classes {len(classes)} where it is built."
        )


def _check_expected_results(cfg: CfgNode) -> None:
    expected = cfg.TEST.EXPECTED_RESULTS
    kinds = {MetadataCatalog.get(name).get("evaluator_type", "coco") for name in cfg.DATASETS.TEST}
    if not expected or kinds != {"coco"}:
        return
    tasks = {"bbox"}
    tasks |= {"segm"} if cfg.MODEL.MASK_ON else set()
    tasks |= {"keypoints"} if cfg.MODEL.KEYPOINT_ON else set()
    tasks |= {f"{task}_TTA" for task in tasks} if cfg.TEST.AUG.ENABLED else set()
    unknown = [entry[0] for entry in expected if entry[0] not in tasks]
    if unknown:
        raise ValueError(
            f"TEST.EXPECTED_RESULTS is {expected}, but {unknown} are not evaluated; expected tasks "
            f"of {sorted(tasks)}."
        )


def check_scored(settings: Settings, needs: Needs, summaries: Sequence[Any]) -> None:
    """Check that the teacher's AP, if one is expected, can be computed.

    Args:
        settings: of a training with a teacher.
        needs: its data sets.
        summaries: of these, from :func:`ssim_kd.data.check_datasets`.

    Raises:
        ValueError: no test set is named, or the first has no ground truth.
    """
    expected, key = settings.expected_ap, settings.key("expected_ap")
    if not expected:
        return
    where = needs.key("DATASETS.TEST")
    if not needs.test:
        raise ValueError(
            f"{key} is {expected}, but {where} is (): expected a data set to evaluate the teacher "
            f"on, or {key} 0."
        )
    first = needs.test[0]
    for summary in summaries:
        if summary.name == first and summary.findings and not summary.findings.scored:
            raise ValueError(
                f"{key} is {expected}, but {where}: data set {first!r} has no annotations to score "
                f"it on; expected a set with ground truth as the first, or {key} 0."
            )


def same_weights(settings: Settings, teacher: str) -> None:
    """Warn if the student starts from the teacher's own file, and log that it is not checked.

    Args:
        settings: of a training.
        teacher: the file of the teacher's weights, which have been loaded; "" for none.
    """
    if settings.weights and teacher:
        start = local_file(_without_options(settings.weights), key=settings.key("weights"))
        if filecmp.cmp(start, local_file(teacher, key=settings.key("teacher")), shallow=False):
            logger.warning(
                "%s is %r, the same file as %s: the student starts as its own teacher and has "
                "nothing to learn from it. Expected the weights of a better detector.",
                *(settings.key("teacher_weights"), teacher, settings.key("weights")),
            )
    if not settings.expected_ap:
        logger.info(
            "%s is 0: the quality of the teacher is not checked, and weights that fit can still be "
            "wrong. Set it to evaluate the teacher first.",
            settings.key("expected_ap"),
        )


def check_teacher(settings: Settings, results: Mapping[str, Any] | None) -> None:
    """Compare the teacher's box AP with what is expected of it.

    Args:
        settings: of the training.
        results: of its evaluation, see :func:`box_ap`; empty but in the main process.

    Raises:
        ValueError: it falls short; on every process.
    """
    expected, key = settings.expected_ap, settings.key("expected_ap")
    reached = comm.all_gather(box_ap(results or {}))[0]
    if math.isnan(reached):
        raise ValueError(
            f"{key} is {expected}, but the evaluation of the teacher has no box AP: the first test "
            f"set has no boxes that count. Expected a set that has, or {key} 0."
        )
    if reached < expected:
        raise ValueError(
            f"The teacher reaches {reached:.2f} AP on the first test set, but {key} is {expected}: "
            "check its weights and config."
        )
    logger.info("The teacher reaches %.2f AP, as expected (%.2f).", reached, expected)


def _without_options(path: str) -> str:
    """Detectron2 main reads options after a "?"; to 0.6 they are part of the name."""
    if not hasattr(detection_checkpoint, "parse_qs"):
        return path
    return urlparse(path)._replace(query="").geturl()
