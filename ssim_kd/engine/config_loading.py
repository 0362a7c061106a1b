"""From the command line to a config, YAML or LazyConfig: file, arguments, overrides.

Overrides (KEY VALUE, key=value) win over arguments, and those over the file.
"""

import argparse
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from ..config import add_distill_config, import_method, share_keys
from ..config_files import (
    allow_program,
    did_you_mean,
    find_config_file,
    is_lazy,
    is_saved_lazy_config,
    load_lazy_file,
    merge_file,
)
from ..data import Needs, check_datasets, count_images, register_datasets, train_records
from ..modeling import DistilledDetector, FrozenTeacher, SSIMDistiller, teacher_name
from ..modeling.saved_lazy import name_functions
from ..yaml_files import near_shipped
from .data_file import apply_data, apply_lazy_data
from .schedule import LazySchedule, YamlSchedule, value_of

# By these names or itself, of which ours reads a file once.
_DETECTRON2_RECORDS = (
    get_detection_dataset_dicts,
    "detectron2.data.get_detection_dataset_dicts",
    "detectron2.data.build.get_detection_dataset_dicts",
)
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
# Overrides of what --teacher puts around the student.
_WRAPPING = ("model.student", "model.teacher", "model.distillers")

AddConfig = Callable[[CfgNode], None]


@dataclass(frozen=True)
class Loaded:
    """What a command line comes to.

    Attributes:
        cfg: a YAML config, frozen, or a LazyConfig.
        config_file: the path of the file; "" for none.
        notes: what arguments have set, a line each, for the log.
    """

    cfg: Any
    config_file: str
    notes: list[str]


def is_evaluation(args: argparse.Namespace) -> bool:
    """Whether a command line trains nothing."""
    return any(getattr(args, flag, False) for flag in ("eval_only", "eval_teacher"))


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
    config_file = _find(args.config_file)
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
        path = _beside(os.path.expanduser(cfg.DATASETS.DATA_FILE), config_file)
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
    node.NAME = _beside(node.NAME, config_file)
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
    if "MODEL.DEVICE" not in by_hand | own and _lacks(cfg.MODEL.DEVICE):
        cfg.MODEL.DEVICE = "cpu"
        notes.append("This machine has no GPU that PyTorch can use: MODEL.DEVICE is 'cpu'.")
    cfg.freeze()
    return Loaded(cfg, config_file, notes)


def load_lazy(args: argparse.Namespace, *, data: bool = True) -> Loaded:
    """Read a LazyConfig, and apply the overrides ("key=value") and the arguments.

    Overrides of ``model`` mean the student where ``--teacher`` wraps it, and are applied before.

    Args:
        args, data: see :func:`load_yaml`.

    Raises:
        ValueError: the file cannot be read, lacks a part, or an override does not fit.
    """
    notes: list[str] = []
    config_file = _find(args.config_file)
    inside = [text for text in args.opts if not text.lstrip("+~").startswith(_WRAPPING)]
    by_hand = {text.lstrip("+~").partition("=")[0] for text in args.opts}
    cfg = _with_overrides(lambda: load_lazy_file(config_file), inside, args)
    trains = not is_evaluation(args)
    needed = ["model", "dataloader", "train", *(["optimizer", "lr_multiplier"] if trains else [])]
    missing = [key for key in needed if key not in cfg]
    if missing:
        raise ValueError(f"--config-file {config_file} lacks {missing}.")
    if getattr(args, "data", "") and data:
        path = _beside(os.path.expanduser(args.data), config_file)
        notes += apply_lazy_data(cfg, path, by_hand)
    if data and trains:
        notes += LazySchedule(cfg).apply(
            epochs=getattr(args, "epochs", None),
            batch=getattr(args, "batch", None),
            by_hand=by_hand,
            count_images=lambda: _count_lazy_images(cfg),
        )
    if getattr(args, "teacher", ""):
        if "student" not in cfg.model:
            # In a deeper place, what names others by their place would name none.
            OmegaConf.resolve(cfg)
        cfg.model = _distilled(cfg.model, args.teacher)
    outside = [text for text in args.opts if text not in inside]
    cfg = _with_overrides(lambda: cfg, outside, args)
    cfg.train.output_dir = os.path.expanduser(cfg.train.output_dir)
    name_functions(cfg)  # so that the folder of the run can be read
    if _lacks(str(cfg.train.device)):
        cfg.train.device = "cpu"
        notes.append("This machine has no GPU that PyTorch can use: train.device is 'cpu'.")
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


def _distilled(model: DictConfig, teacher: str) -> DictConfig:
    """A model that learns from a teacher: what it was, wrapped, if it learned from none."""
    if "student" not in model:
        model = L(DistilledDetector)(student=model, max_iter="${..train.max_iter}")
    if not model.get("distillers"):
        model.distillers = [L(SSIMDistiller)()]
    model.teacher = L(FrozenTeacher.load_from)(name=teacher)
    return model


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


def _lacks(device: str) -> bool:
    return device.startswith("cuda") and not torch.cuda.is_available()


def _count_images(cfg: CfgNode) -> int:
    """The number of images that are trained on; the checks name a fault."""
    register_datasets(cfg)
    needs = Needs.from_config(cfg)
    try:
        return count_images(needs)
    except Exception:
        check_datasets(needs, train=True)
        raise


def _count_lazy_images(cfg: DictConfig) -> int:
    try:
        node = cfg.dataloader.train.dataset
        if node.get("_target_") in _DETECTRON2_RECORDS:
            return len(train_records(**{key: node[key] for key in node if key != "_target_"}))
        return len(instantiate(node))
    except Exception as error:
        raise ValueError(
            "--epochs needs the number of images of dataloader.train.dataset, which cannot be "
            f"counted ({type(error).__name__}: {error}); expected a data set with a length, or "
            "train.max_iter instead of --epochs."
        ) from error


def _find(name: str) -> str:
    path = find_config_file(os.path.expanduser(name))
    if path and not PathManager.exists(path):
        raise ValueError(
            f"--config-file is {name!r}, which cannot be opened: neither a file nor the name of a "
            f"config of ssim_kd or of Detectron2's model zoo{near_shipped(name)}."
        )
    return path


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


def _with_overrides(
    load: Callable[[], DictConfig], opts: list[str], args: argparse.Namespace
) -> DictConfig:
    try:
        return LazyConfig.apply_overrides(load(), opts)
    except Exception as error:
        raise ValueError(
            f"--config-file {args.config_file} with {list(args.opts)} is not readable: "
            f"{type(error).__name__}: {error}. Expected a LazyConfig, and overrides key=value."
        ) from error


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


def _beside(path: str, config_file: str) -> str:
    """A path that is not there may be relative to the folder of ``--config-file``."""
    beside = os.path.join(os.path.dirname(config_file), path)
    return beside if path and not os.path.exists(path) and os.path.exists(beside) else path
