"""From the command line to a config: defaults, file, arguments and overrides."""

import argparse
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from ..config import add_distill_config, share_keys
from ..config_files import did_you_mean, find_config_file, is_lazy, load_lazy_file, merge_file
from ..modeling import DistilledDetector, FrozenTeacher, SSIMDistiller
from .arguments import apply_schedule, apply_teacher, use_cpu_without_gpu, without_effect
from .data_file import apply_data
from .preflight import check_config

logger = logging.getLogger(__name__)

# Config keys that hold paths, in which "~" is the user's home.
_PATHS = (
    *("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DISTILL.TEACHER.CONFIG_FILE"),
    *("MODEL.DISTILL.TEACHER.WEIGHTS", "DATASETS.PROPOSAL_FILES_TRAIN"),
    "DATASETS.PROPOSAL_FILES_TEST",
)

# Arguments that set keys of a YAML config, and what a LazyConfig has instead.
_OF_YAML = {
    "data": "dataloader.train.dataset.names",
    "epochs": "train.max_iter",
    "batch": "dataloader.train.total_batch_size",
}
# Overrides of what --teacher puts around the student.
_WRAPPING = ("model.student", "model.teacher", "model.distillers")

AddConfig = Callable[[CfgNode], None]


def load_config(args: argparse.Namespace, add_config: AddConfig | None = None) -> CfgNode:
    """Detectron2's defaults, ours, the file, the overrides; frozen.

    ``args.config_file`` becomes the path of the file, which Detectron2's ``default_setup`` opens.

    Raises:
        ValueError: an unknown key, a file that is not readable, or what :func:`check_config`
            raises.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    if add_config is not None:
        add_config(cfg)
        share_keys(add_config)
    config_file = args.config_file = find_config_file(os.path.expanduser(args.config_file))
    in_file = _merge_file(cfg, config_file) if config_file else set()
    by_hand = {str(key) for key in args.opts[::2]}
    # Arguments of another program's may lack these.
    flags = {k: getattr(args, k, None) for k in ("teacher", "data", "epochs", "batch")}
    cfg.DATASETS.DATA_FILE = flags["data"] or cfg.DATASETS.DATA_FILE
    notes = []
    if cfg.DATASETS.DATA_FILE:
        path = _beside(os.path.expanduser(cfg.DATASETS.DATA_FILE), config_file)
        notes += apply_data(cfg, path, in_file)
    max_iter = cfg.SOLVER.MAX_ITER
    _merge_options(cfg, list(args.opts))
    if flags["teacher"]:
        apply_teacher(cfg, flags["teacher"])
    for key in _PATHS:
        _expand(cfg, key)
    teacher = cfg.MODEL.DISTILL.TEACHER
    teacher.CONFIG_FILE = _beside(teacher.CONFIG_FILE, config_file)
    evaluate = any(getattr(args, flag, False) for flag in ("eval_only", "eval_teacher"))
    if not evaluate:
        length = {"epochs": flags["epochs"], "batch": flags["batch"], "max_iter": max_iter}
        notes += apply_schedule(cfg, **length, by_hand=by_hand)
        notes += without_effect(cfg)
    notes += use_cpu_without_gpu(cfg, by_hand | in_file)
    args.notes = [*getattr(args, "notes", []), *notes]
    check_config(cfg, evaluate=evaluate)
    cfg.freeze()
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> set[str]:
    """Merge a config file; returns the keys that it and its bases set."""
    if is_lazy(path):
        raise ValueError(
            f"--config-file {path} is a LazyConfig; expected a .yaml file. ssim-kd train, eval "
            "and export take both."
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


def _merge_options(cfg: CfgNode, opts: list[str]) -> None:
    if len(opts) % 2:
        raise ValueError(f"{opts[-1]} has no value; expected KEY VALUE pairs, not {opts}.")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        default = _get(cfg, key)
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


def _get(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    return node


def _expand(cfg: CfgNode, key: str) -> None:
    """Replace "~" in a path, or in each of several."""
    *parents, name = key.split(".")
    node = _get(cfg, ".".join(parents)) if parents else cfg
    value = node[name]
    if isinstance(value, str):
        node[name] = os.path.expanduser(value)
    else:
        node[name] = type(value)(os.path.expanduser(path) for path in value)


def _beside(path: str, config_file: str) -> str:
    """A path that is not there may be relative to the folder of ``--config-file``."""
    beside = os.path.join(os.path.dirname(config_file), path)
    return beside if path and not os.path.exists(path) and os.path.exists(beside) else path


def check_lazy_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError at an argument that sets keys of a YAML config: it would have no effect."""
    for argument, key in _OF_YAML.items():
        if getattr(args, argument, None):
            raise ValueError(
                f"--{argument} is for a YAML config, and --config-file is {args.config_file}; "
                f"expected {key}=VALUE."
            )


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """Read ``--config-file`` and apply the overrides ("key=value") and ``--teacher``.

    Overrides of ``model`` mean the student where ``--teacher`` wraps it. ``args.config_file``
    becomes the path of the file, which Detectron2's ``default_setup`` opens.

    Raises:
        ValueError: the file cannot be read, lacks a part, or an override does not fit.
    """
    args.config_file = find_config_file(os.path.expanduser(args.config_file))
    try:
        cfg = load_lazy_file(args.config_file)
        inside = [text for text in args.opts if not text.lstrip("+~").startswith(_WRAPPING)]
        cfg = LazyConfig.apply_overrides(cfg, inside)
        if getattr(args, "teacher", ""):
            cfg.model = _distilled(cfg.model, args.teacher)
        cfg = LazyConfig.apply_overrides(cfg, [text for text in args.opts if text not in inside])
    except Exception as error:
        raise ValueError(
            f"--config-file {args.config_file} with {list(args.opts)} is not readable: "
            f"{type(error).__name__}: {error}. Expected a LazyConfig, and overrides key=value."
        ) from error
    needed = ("model", "dataloader", "train") + (
        () if args.eval_only else ("optimizer", "lr_multiplier")
    )
    missing = [key for key in needed if key not in cfg]
    if missing:
        raise ValueError(f"--config-file {args.config_file} lacks {missing}.")
    if getattr(args, "eval_teacher", False):
        raise ValueError(
            "--eval-teacher needs a YAML student; expected the teacher's own config for "
            "--config-file, and --eval-only."
        )
    cfg.train.output_dir = os.path.expanduser(cfg.train.output_dir)
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("train.device is %r, but there is no GPU: 'cpu' is used.", cfg.train.device)
        cfg.train.device = "cpu"
    return cfg


def _distilled(model: DictConfig, teacher: str) -> DictConfig:
    """A model that learns from a teacher: what it was, wrapped, if it learned from none."""
    if "student" not in model:
        model = L(DistilledDetector)(student=model, max_iter="${..train.max_iter}")
    if not model.get("distillers"):
        model.distillers = [L(SSIMDistiller)()]
    model.teacher = L(FrozenTeacher.load_from)(name=teacher)
    return model
