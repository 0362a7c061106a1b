"""From the command line of a YAML config to the config: file, arguments, overrides.

Overrides (KEY VALUE) win over arguments, and those over the file.
"""

import argparse
import copy
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from ..command_line import is_evaluation
from ..config import add_distill_config, import_method, share_keys
from ..config_files import (
    Loaded,
    allow_program,
    beside,
    did_you_mean,
    find_file,
    is_lazy,
    is_saved_lazy_config,
    lacks_gpu,
    merge_file,
)
from ..data import Needs, check_datasets, count_images, register_datasets
from ..data.needs import num_classes_key
from ..modeling import teacher_name
from .data_file import read_data_file
from .schedule import ConfigSchedule, Schedule, below, is_count, scaled_points, value_of

# Config keys that hold paths, in which "~" is the user's home.
_PATHS = (
    *("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DISTILL.TEACHER.NAME"),
    *("MODEL.DISTILL.TEACHER.WEIGHTS", "DATASETS.PROPOSAL_FILES_TRAIN"),
    "DATASETS.PROPOSAL_FILES_TEST",
)
# The teacher's name, and what this key was called before.
_FORMER = "MODEL.DISTILL.TEACHER.CONFIG_FILE"
_TEACHER = {"MODEL.DISTILL.TEACHER.NAME", _FORMER}
# Keys of which arguments take in what overrides have set.
_EXTENDED = ("DATASETS.REGISTER_COCO", "MODEL.META_ARCHITECTURE")

AddConfig = Callable[[CfgNode], None]


def load_yaml(
    args: argparse.Namespace, add_config: AddConfig | None = None, *, data: bool = True
) -> Loaded:
    """Detectron2's defaults, ours, the file, the arguments, the overrides.

    Args:
        args: of :func:`ssim_kd.engine.argument_parser`; those of another parser may lack some.
        add_config: adds further keys to the config.
        data: False leaves out what ``--data``, ``--epochs`` and ``--batch`` ask for, which may
            need the data. All processes read them together.

    Raises:
        ValueError: an unknown key, or a file that is not readable.
    """
    cfg, notes = get_cfg(), list[str]()
    add_distill_config(cfg)
    for add in filter(None, (add_config, *map(import_method, getattr(args, "imports", ())))):
        add(cfg)
        share_keys(add)
    config_file = find_file(args.config_file)
    own = _merge_file(cfg, config_file) if config_file else set()
    max_iter = cfg.SOLVER.MAX_ITER
    opts, by_hand = list(args.opts), {str(key) for key in args.opts[::2]}
    method = cfg.MODEL.DISTILL.NAME or cfg.MODEL.DISTILL.LOSS
    _merge_options(cfg, opts)
    if method and "MODEL.DISTILL.NAME" in by_hand and method != cfg.MODEL.DISTILL.NAME:
        # Those in the file belong to its method.
        for key in ("LOSS_WEIGHT", "IN_FEATURES", "ADAPTER"):
            if f"MODEL.DISTILL.{key}" not in by_hand:
                cfg.MODEL.DISTILL[key] = None
    # From here on all is computed from what the overrides have set; and they win over it.
    data_file, teacher = getattr(args, "data", ""), getattr(args, "teacher", "")
    if data_file and "DATASETS.DATA_FILE" not in by_hand:
        cfg.DATASETS.DATA_FILE = data_file
    if cfg.DATASETS.DATA_FILE and data:
        path = beside(os.path.expanduser(cfg.DATASETS.DATA_FILE), config_file)
        notes += apply_data(cfg, path, own - by_hand)
    if teacher:
        apply_teacher(cfg, teacher)
    _merge_options(cfg, opts, but=_EXTENDED)
    node = cfg.MODEL.DISTILL.TEACHER
    if _TEACHER & by_hand == {_FORMER}:
        node.NAME = ""  # of the file
    node.NAME, node.CONFIG_FILE = teacher_name(cfg), ""
    for key in _PATHS:
        _expand(cfg, key)
    node.NAME = beside(node.NAME, config_file)
    if is_lazy(node.NAME) and (teacher or _TEACHER & by_hand):
        allow_program(node.NAME)
    if data and not is_evaluation(args):
        # A user's warm-up stays, unless it belongs to a length of theirs, which is scaled.
        stay = own & {"SOLVER.WARMUP_ITERS"} if "SOLVER.MAX_ITER" not in own else set()
        notes += YamlSchedule(cfg).apply(
            epochs=getattr(args, "epochs", None),
            batch=getattr(args, "batch", None),
            by_hand=by_hand | stay,
            count_images=lambda: _count_images(cfg),
            max_iter=max_iter,
        )
        notes += ignored_keys(cfg)
    if "MODEL.DEVICE" not in by_hand | own and lacks_gpu(cfg.MODEL.DEVICE):
        cfg.MODEL.DEVICE = "cpu"
        notes.append("This machine has no GPU that PyTorch can use: MODEL.DEVICE is 'cpu'.")
    cfg.freeze()
    return Loaded(cfg, config_file, notes)


def apply_teacher(cfg: CfgNode, name: str) -> None:
    """Set the keys of ``--teacher``: the student is whatever META_ARCHITECTURE names."""
    distill = cfg.MODEL.DISTILL
    if cfg.MODEL.META_ARCHITECTURE != "DistilledDetector":
        distill.STUDENT_META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "DistilledDetector"
    if name != teacher_name(cfg):
        # The weights and overrides in the config belong to the other teacher.
        distill.TEACHER.WEIGHTS, distill.TEACHER.OPTS = "", []
    distill.TEACHER.NAME, distill.TEACHER.CONFIG_FILE = name, ""
    distill.ENABLED = True


def ignored_keys(cfg: CfgNode) -> list[str]:
    """A line for the log where a config names a teacher or a method, and switches both off."""
    distill = cfg.MODEL.DISTILL
    named = {
        "TEACHER.NAME": distill.TEACHER.NAME,
        "TERMS": distill.TERMS,
        "NAME": distill.NAME,
    }
    found = [f"MODEL.DISTILL.{key} {value}" for key, value in named.items() if value]
    if distill.ENABLED or not found or cfg.MODEL.META_ARCHITECTURE != "DistilledDetector":
        return []
    return [
        "MODEL.DISTILL.ENABLED is False: the student learns without a teacher. "
        f"Ignored: {', '.join(found)}."
    ]


def _count_images(cfg: CfgNode) -> int:
    """The number of images that are trained on; the checks name a fault."""
    register_datasets(cfg)
    needs = Needs.from_config(cfg)
    try:
        return count_images(needs)
    except Exception:
        check_datasets(needs, train=True)
        raise


def apply_data(cfg: CfgNode, path: str, own: Collection[str]) -> list[str]:
    """Set the data sets and the number of classes of a data file in a YAML config, in place.

    Args:
        cfg: changed in place.
        path: of the file.
        own: keys that the user's config file sets; classes among them must be the data's.

    Returns:
        what was set, a line each.

    Raises:
        ValueError: see :func:`read_data_file`; or other classes.
    """
    data = read_data_file(path)
    entries = list(data.entries.values())
    registered = [entry for entry in cfg.DATASETS.REGISTER_COCO if entry not in entries]
    cfg.DATASETS.REGISTER_COCO = [*registered, *entries]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data.entries["train"][0],), data.tests
    read = num_classes_key(cfg) or "MODEL.ROI_HEADS.NUM_CLASSES"
    for node, key in (
        (cfg.MODEL.ROI_HEADS, "MODEL.ROI_HEADS.NUM_CLASSES"),
        (cfg.MODEL.RETINANET, "MODEL.RETINANET.NUM_CLASSES"),
    ):
        if key == read and key in own and data.classes != node.NUM_CLASSES:
            raise ValueError(
                f"{key} is {node.NUM_CLASSES} in the config file, but {data.entries['train'][1]} "
                f"has {data.classes} categories; expected the same. Leave the key out of the file."
            )
        node.NUM_CLASSES = data.classes
    return [f"--data {path}: {data.classes} classes, {cfg.DATASETS.TRAIN} and {data.tests}"]


def _merge_file(cfg: CfgNode, path: str) -> set[str]:
    """Merge a config file; returns the keys that the user's own files set."""
    if is_lazy(path):
        raise ValueError(
            f"--config-file {path} is a LazyConfig; expected a .yaml file. ssim-kd train, eval "
            "and export take both."
        )
    if is_saved_lazy_config(path):
        raise ValueError(
            f"--config-file {path} is what a training of a LazyConfig leaves, for --teacher; "
            "expected the .py of that training."
        )
    try:
        return merge_file(cfg, path)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"--config-file {path} asks to run code ({error.problem}, line "
            f"{error.problem_mark.line + 1}), which is refused; expected plain values."
        ) from error
    except (AssertionError, KeyError, ValueError, yaml.YAMLError) as error:
        advice = " (where a float is expected, 2 is written 2.0)" if "float" in str(error) else ""
        if isinstance(error, KeyError):
            advice = did_you_mean(cfg, str(error))
        raise ValueError(f"--config-file {path} cannot be read: {error}{advice}") from error


def _merge_options(cfg: CfgNode, opts: list[str], *, but: Collection[str] = ()) -> None:
    if len(opts) % 2:
        raise ValueError(f"{opts[-1]} has no value; expected KEY VALUE pairs, not {opts}.")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key in but:
            continue
        if key == "MODEL.DISTILL.LOSS_WEIGHT":  # a number or "auto", whatever a file has
            cfg.MODEL.DISTILL.LOSS_WEIGHT = None
        default = value_of(cfg, key)
        if isinstance(default, float) and re.fullmatch(r"[+-]?\d+", str(value)):
            value = f"{value}.0"  # a whole number for a float
        if isinstance(default, float) and re.fullmatch(
            r"(?i)[+-]?\.?(nan|inf(inity)?)", str(value)
        ):
            raise ValueError(f"{key} is {value}; expected a finite number.")
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, ValueError) as error:
            near = did_you_mean(cfg, key) if "Non-existent" in str(error) else ""
            raise ValueError(
                f"{key} {value}: {error.args[0]}.{near} Expected KEY VALUE pairs of known keys, "
                "and values of the type of the default."
            ) from error


def _expand(cfg: CfgNode, key: str) -> None:
    """Replace "~" in a path, or in each of several."""
    section, _, name = key.rpartition(".")
    node = value_of(cfg, section) if section else cfg
    value = node[name]
    if isinstance(value, str):
        node[name] = os.path.expanduser(value)
    else:
        node[name] = type(value)(os.path.expanduser(path) for path in value)


class YamlSchedule(ConfigSchedule):
    """The schedule in a YAML config."""

    keys = {
        "batch": "SOLVER.IMS_PER_BATCH",
        "max_iter": "SOLVER.MAX_ITER",
        "milestones": "SOLVER.STEPS",
        "lr": "SOLVER.BASE_LR",
        "warmup": "SOLVER.WARMUP_ITERS",
        "checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
        "eval_period": "TEST.EVAL_PERIOD",
    }

    def read(self) -> Schedule:
        """The schedule of the config."""
        found = super().read()
        return replace(found, milestones=tuple(found.milestones or ()))

    def write(self, schedule: Schedule, by_hand: Collection[str] = ()) -> None:
        """Set the keys of the config, but those that were set by hand."""
        # Its lists may be those of another config that was merged.
        self.cfg.MODEL.DISTILL.TERMS = copy.deepcopy(self.cfg.MODEL.DISTILL.TERMS)
        super().write(schedule, by_hand)

    def counts(self) -> Iterator[tuple[str, Any, Any]]:
        """Also of the terms."""
        yield from below("MODEL.DISTILL", self.cfg.MODEL.DISTILL)
        for i, term in enumerate(self.cfg.MODEL.DISTILL.TERMS):
            for k in range(1, len(term) - 1, 2):
                if is_count(term[k].rpartition(".")[2]):
                    yield f"MODEL.DISTILL.TERMS[{i}].{term[k]}", term, k + 1

    def epochs(self, asked: float | None, by_hand: Collection[str], notes: list[str]) -> Any:
        """The epochs to train for: what is asked for, or ``SOLVER.EPOCHS``."""
        own = self.cfg.SOLVER.EPOCHS
        if not 0 <= own < math.inf:
            raise ValueError(f"SOLVER.EPOCHS is {own}; expected 0 or a positive number.")
        if own and {"SOLVER.EPOCHS", "SOLVER.MAX_ITER"} <= set(by_hand):
            raise ValueError(
                f"SOLVER.EPOCHS is {own} and SOLVER.MAX_ITER {self.cfg.SOLVER.MAX_ITER}; expected "
                "one of them."
            )
        if asked is not None and "SOLVER.EPOCHS" not in by_hand:
            return asked
        if asked is not None:
            notes.append(f"SOLVER.EPOCHS {own:g} is set by hand: not --epochs {asked:g}.")
        return own or None


def scale_workers(cfg: CfgNode, world_size: int) -> CfgNode:
    """``DefaultTrainer.auto_scale_workers``, the iterations of distillers included."""
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if scaled is cfg:
        return cfg
    ratio, frozen = cfg.SOLVER.IMS_PER_BATCH / scaled.SOLVER.IMS_PER_BATCH, scaled.is_frozen()
    scaled.defrost()
    schedule, length = YamlSchedule(cfg).read(), scaled.SOLVER.MAX_ITER
    counts = tuple((key, scaled_points(value, ratio, length)) for key, value in schedule.distillers)
    YamlSchedule(scaled).write_counts(replace(schedule, distillers=counts))
    if frozen:
        scaled.freeze()
    return scaled
