"""The command line: Detectron2's arguments, and those that stand for several config keys.

``--teacher``, ``--data``, ``--epochs`` and ``--batch`` set config keys; whatever a KEY VALUE pair
sets by hand wins. What they chose is logged.
"""

import argparse
import math
import sys
from collections.abc import Collection
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.engine import default_argument_parser

from ..data import check_datasets, register_datasets

# Iterations of the config that follow the length of the training.
_PERIODS = ("WARMUP_ITERS", "CHECKPOINT_PERIOD")


_EXAMPLES = """
Examples:

Distil from a better detector, and train the control without it:
    $ {program} --config-file cfg.yaml --num-gpus 8 --teacher output/teacher \\
        OUTPUT_DIR output/distilled
    $ {program} --config-file cfg.yaml --num-gpus 8 OUTPUT_DIR output/plain

Your own data in COCO format, 12 epochs, another option of the config:
    $ {program} --config-file cfg.yaml --data data.yaml --epochs 12 --batch 8 \\
        --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml MODEL.DISTILL.LOSS_WEIGHT 2.0

Go on with a run that was stopped; evaluate its student:
    $ {program} --config-file cfg.yaml --teacher output/teacher --resume OUTPUT_DIR output/distilled
    $ {program} --config-file output/distilled/config.yaml --eval-only \\
        MODEL.WEIGHTS output/distilled/model_final.pth

Several machines:
    (machine0)$ {program} --machine-rank 0 --num-machines 2 --dist-url <URL> [--other-flags]
    (machine1)$ {program} --machine-rank 1 --num-machines 2 --dist-url <URL> [--other-flags]
"""


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's own arguments, and those of distillation."""
    parser = default_argument_parser(_EXAMPLES.format(program=sys.argv[0]))
    parser.add_argument(
        "--eval-teacher",
        action="store_true",
        help="evaluate the teacher of MODEL.DISTILL.TEACHER by itself on DATASETS.TEST",
    )
    parser.add_argument(
        "--teacher",
        default="",
        metavar="NAME",
        help="distil from this teacher: the folder of a run, a name of the model zoo (.yaml or "
        ".py), a config file with weights beside it, or a checkpoint; the same as "
        "MODEL.DISTILL.TEACHER.CONFIG_FILE",
    )
    parser.add_argument(
        "--data",
        default="",
        metavar="DATA.YAML",
        help="train and test on the COCO-format sets of this file; the same as DATASETS.DATA_FILE",
    )
    parser.add_argument(
        "--epochs", type=float, help="length of the training; the same as SOLVER.EPOCHS"
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images a step, all processes together; the learning rate is scaled linearly from the "
        "config's, and without --epochs the schedule as well",
    )
    return parser


def apply_teacher(cfg: CfgNode, name: str) -> None:
    """Set the keys of ``--teacher``: the student is whatever META_ARCHITECTURE names."""
    distill = cfg.MODEL.DISTILL
    if cfg.MODEL.META_ARCHITECTURE != "DistilledDetector":
        distill.STUDENT_META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "DistilledDetector"
    if name != distill.TEACHER.CONFIG_FILE:
        # The weights and overrides in the config belong to the other teacher.
        distill.TEACHER.WEIGHTS, distill.TEACHER.OPTS = "", []
    distill.TEACHER.CONFIG_FILE = name
    distill.ENABLED = True


def without_effect(cfg: CfgNode) -> list[str]:
    """A line for the log where a config names a teacher or a method, and switches both off."""
    distill = cfg.MODEL.DISTILL
    named = {
        "TEACHER.CONFIG_FILE": distill.TEACHER.CONFIG_FILE,
        "TERMS": distill.TERMS,
        "NAME": distill.NAME,
    }
    found = [f"MODEL.DISTILL.{key} {value}" for key, value in named.items() if value]
    if distill.ENABLED or not found or cfg.MODEL.META_ARCHITECTURE != "DistilledDetector":
        return []
    return [
        "MODEL.DISTILL.ENABLED is False: the student learns without a teacher. "
        f"Without effect: {', '.join(found)}."
    ]


def apply_schedule(
    cfg: CfgNode,
    *,
    epochs: float | None,
    batch: int | None,
    by_hand: Collection[str],
    max_iter: int | None = None,
) -> list[str]:
    """Set the schedule that ``--epochs`` and ``--batch`` ask for.

    With a batch of B images for the config's B0 the learning rate becomes B / B0 of the config's.
    E epochs are E x images / B iterations; STEPS keep their share of MAX_ITER, and those that
    fall on its end are left out. Without epochs a batch keeps the number of images that are seen.
    With epochs the student is evaluated after each, and saved once in each at most.

    Args:
        cfg: changed in place; its data sets can be registered.
        epochs: > 0; None: ``SOLVER.EPOCHS``, where 0 leaves MAX_ITER as it is.
        batch: images a step, >= 1; None: as in the config.
        by_hand: keys of KEY VALUE pairs, which stay as they are; so does their MAX_ITER.
        max_iter: of the config without these pairs, to which its STEPS belong; None: that of cfg.

    Returns:
        what was set, and what a pair stands for; [] for nothing.

    Raises:
        ValueError: a value out of its range, a length that two pairs give, or one that is shorter
            than a step.
    """
    solver = cfg.SOLVER
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"--epochs is {epochs}; expected a positive number.")
    if batch is not None and batch < 1:
        raise ValueError(f"--batch is {batch}; expected a positive number.")
    if not 0 <= solver.EPOCHS < math.inf:
        raise ValueError(f"SOLVER.EPOCHS is {solver.EPOCHS}; expected 0 or a positive number.")
    if solver.EPOCHS and {"SOLVER.EPOCHS", "SOLVER.MAX_ITER"} <= set(by_hand):
        raise ValueError(
            f"SOLVER.EPOCHS is {solver.EPOCHS} and SOLVER.MAX_ITER {solver.MAX_ITER}; expected one "
            "of them."
        )
    notes = []
    if epochs is None or "SOLVER.EPOCHS" in by_hand:
        if epochs is not None:
            notes.append(
                f"SOLVER.EPOCHS {solver.EPOCHS:g} is set by hand: not --epochs {epochs:g}."
            )
        epochs = solver.EPOCHS
    if batch is not None and "SOLVER.IMS_PER_BATCH" in by_hand:
        notes.append(f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is set by hand: not --batch.")
        batch = None
    if not epochs and batch is None:
        return notes
    before, factor = int(solver.MAX_ITER), 1.0
    if epochs and max_iter is not None:
        before = max_iter
    if batch is not None:
        factor = batch / solver.IMS_PER_BATCH
        solver.IMS_PER_BATCH = batch
        if "SOLVER.BASE_LR" not in by_hand:
            solver.BASE_LR = float(solver.BASE_LR * factor)
    images = None
    if epochs:
        images = _count_images(cfg)
        steps = round(epochs * images / solver.IMS_PER_BATCH)
        if "SOLVER.MAX_ITER" in by_hand:
            notes.append(
                f"SOLVER.MAX_ITER {solver.MAX_ITER} is set by hand: not the {steps} iterations of "
                f"--epochs (SOLVER.EPOCHS) {epochs:g}."
            )
        elif not steps:
            raise ValueError(
                f"--epochs (SOLVER.EPOCHS) is {epochs:g} and --batch (SOLVER.IMS_PER_BATCH) "
                f"{solver.IMS_PER_BATCH}, which of {images} images is less than one iteration; "
                "expected more epochs or a smaller batch."
            )
        else:
            solver.MAX_ITER = steps
        if not cfg.TEST.EVAL_PERIOD and "TEST.EVAL_PERIOD" not in by_hand:
            cfg.TEST.EVAL_PERIOD = max(1, images // solver.IMS_PER_BATCH)
    elif "SOLVER.MAX_ITER" not in by_hand:
        solver.MAX_ITER = max(1, round(before / factor))
    ratio = solver.MAX_ITER / before
    if "SOLVER.STEPS" not in by_hand:
        scaled = {round(step * ratio) for step in solver.STEPS}
        solver.STEPS = tuple(sorted(step for step in scaled if 0 < step < solver.MAX_ITER))
    for key in _PERIODS:
        if f"SOLVER.{key}" not in by_hand:
            solver[key] = max(1, round(solver[key] * min(ratio, 1.0))) if solver[key] else 0
    if images and solver.CHECKPOINT_PERIOD and "SOLVER.CHECKPOINT_PERIOD" not in by_hand:
        epoch = math.ceil(images / solver.IMS_PER_BATCH)
        solver.CHECKPOINT_PERIOD = max(solver.CHECKPOINT_PERIOD, epoch)
    seen = f" for {images} images" if images is not None else ""
    return [
        *notes,
        f"Schedule{seen}: SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, MAX_ITER {solver.MAX_ITER}, "
        f"STEPS {solver.STEPS}, BASE_LR {solver.BASE_LR:g}, WARMUP_ITERS {solver.WARMUP_ITERS}, "
        f"CHECKPOINT_PERIOD {solver.CHECKPOINT_PERIOD}; TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD}",
    ]


def _count_images(cfg: CfgNode) -> int:
    """The number of images that are trained on; the checks name a fault."""
    register_datasets(cfg)
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    try:
        return len(get_detection_dataset_dicts(list(cfg.DATASETS.TRAIN), filter_empty=filter_empty))
    except Exception:
        check_datasets(cfg, train=True)
        raise


def resolved_options(cfg: CfgNode) -> list[Any]:
    """The schedule as KEY VALUE pairs, for processes that need not count the images again."""
    keys = ("IMS_PER_BATCH", "MAX_ITER", "STEPS", "BASE_LR", *_PERIODS)
    pairs = [x for key in keys for x in (f"SOLVER.{key}", str(cfg.SOLVER[key]))]
    return [*pairs, "SOLVER.EPOCHS", "0.0", "TEST.EVAL_PERIOD", str(cfg.TEST.EVAL_PERIOD)]


def use_cpu_without_gpu(cfg: CfgNode, by_hand: Collection[str]) -> list[str]:
    """Train on the CPU of a machine without a GPU, unless MODEL.DEVICE was set by hand."""
    wants_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if not wants_gpu or torch.cuda.is_available() or "MODEL.DEVICE" in by_hand:
        return []
    cfg.MODEL.DEVICE = "cpu"
    return ["This machine has no GPU that PyTorch can use: MODEL.DEVICE is 'cpu'."]
