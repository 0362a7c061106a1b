"""What train_net.py does: set up, then train or evaluate."""

import argparse
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import add_distill_config, write_stock_config
from ..config_files import merge_file
from ..data import check_datasets, register_datasets
from .evaluation import (
    check_teacher,
    student_for_evaluation,
    teacher_for_evaluation,
    test_time_augmentation,
)
from .launch import launch_processes
from .output_lock import output_lock
from .preflight import check_config, check_start, warn_of_same_weights
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)

_FLAGS = ("resume", "eval_only", "eval_teacher")

AddConfig = Callable[[CfgNode], None]


def run(args: argparse.Namespace, add_config: AddConfig | None = None) -> Any:
    """Do what the command line asks for, in as many processes as it asks for.

    Args:
        args: of :func:`argument_parser`.
        add_config: adds further keys to the config (those of projects); picklable.

    Returns:
        the results of the evaluation where they come about in this process, else None.
    """
    # Read once before any process is started: a wrong key is then told once.
    cfg = load_config(args, add_config)
    return launch_processes(main, args, device=cfg.MODEL.DEVICE, main_args=(args, add_config))


def load_config(args: argparse.Namespace, add_config: AddConfig | None = None) -> CfgNode:
    """Detectron2's defaults, ours, the file, the overrides; frozen.

    Raises:
        ValueError: an unknown key, a file that cannot be read, or what :func:`check_config` raises.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    if add_config is not None:
        add_config(cfg)
    if args.config_file:
        _merge_file(cfg, args.config_file)
    try:
        cfg.merge_from_list(_with_floats(cfg, args.opts))
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"{error.args[0]}. Expected KEY VALUE pairs of known keys, not {args.opts}."
        ) from error
    _resolve_teacher(cfg, args.config_file)
    # Arguments of another program's may lack these.
    evaluate = any(getattr(args, flag, False) for flag in ("eval_only", "eval_teacher"))
    check_config(cfg, evaluate=evaluate)
    cfg.freeze()
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> None:
    try:
        merge_file(cfg, path)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"--config-file {path} asks to run code ({error.problem}, line "
            f"{error.problem_mark.line + 1}), which is refused; expected plain values."
        ) from error
    except (AssertionError, KeyError, ValueError, yaml.YAMLError) as error:
        advice = " (where a float is expected, 2 is written 2.0)" if "float" in str(error) else ""
        raise ValueError(f"--config-file {path} cannot be read: {error}{advice}") from error


def _with_floats(cfg: CfgNode, opts: list[str]) -> list[str]:
    """Overrides in which a whole number for a key that holds a float is one: 2 becomes 2.0."""
    found = list(opts)
    for i in range(0, len(found) - 1, 2):
        node: Any = cfg
        for part in found[i].split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", str(found[i + 1])):
            found[i + 1] = f"{found[i + 1]}.0"
    return found


def _resolve_teacher(cfg: CfgNode, config_file: str) -> None:
    """A teacher's config may be named relative to the folder of the student's."""
    teacher = cfg.MODEL.DISTILL.TEACHER
    beside = os.path.join(os.path.dirname(config_file), teacher.CONFIG_FILE)
    if teacher.CONFIG_FILE and not os.path.isfile(teacher.CONFIG_FILE) and os.path.isfile(beside):
        teacher.CONFIG_FILE = beside


def main(args: argparse.Namespace, add_config: AddConfig | None = None) -> Any:
    """Train or evaluate in this process, one of one or more."""
    cfg = load_config(args, add_config)
    _same_on_all(cfg, args)
    _make_output_dir(cfg.OUTPUT_DIR)
    if args.eval_only or args.eval_teacher:
        return _evaluate(cfg, args)
    # Before anything is written there.
    with output_lock(cfg.OUTPUT_DIR):
        return _train(cfg, args)


def _make_output_dir(folder: str) -> None:
    if not folder:  # an evaluation that keeps no log
        return
    try:
        PathManager.mkdirs(folder)
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR is {folder!r}, which cannot be made ({error.strerror or error}); expected "
            "a folder that can be written to."
        ) from error
    if "://" not in folder and not os.path.isdir(folder):
        raise ValueError(f"OUTPUT_DIR is {folder!r}, which is a file; expected a folder.")


def _set_up(cfg: CfgNode, args: argparse.Namespace, *, training: bool) -> None:
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ssim_kd")
    register_datasets(cfg)
    if training:
        _once(lambda: check_start(cfg, resume=args.resume))
    _once(lambda: _check_data(cfg, train=training))


def _evaluate(cfg: CfgNode, args: argparse.Namespace) -> Any:
    _set_up(cfg, args, training=False)
    if args.eval_teacher:
        cfg, model = teacher_for_evaluation(cfg)
    else:
        cfg, model = student_for_evaluation(cfg, resume=args.resume)
    results = DistillTrainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(test_time_augmentation(cfg, model, DistillTrainer))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _train(cfg: CfgNode, args: argparse.Namespace) -> Any:
    _set_up(cfg, args, training=True)
    if comm.is_main_process():
        # What deploys the student: a config that stock Detectron2 reads.
        write_stock_config(cfg, os.path.join(cfg.OUTPUT_DIR, "student.yaml"))
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if trainer.teacher_sha256 and not trainer.start_iter:
        if comm.is_main_process():
            warn_of_same_weights(cfg)
        expected = cfg.MODEL.DISTILL.TEACHER.EXPECTED_AP
        if expected:
            check_teacher(cfg, DistillTrainer, expected)
    return trainer.train()


def _same_on_all(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Stop if the processes were given different configs or flags."""
    flags = {f"--{k.replace('_', '-')}": getattr(args, k) for k in _FLAGS}
    texts = comm.all_gather(f"{cfg.dump()}{flags}")
    unlike = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if unlike:
        ours, theirs = (set(texts[rank].splitlines()) for rank in (0, unlike[0]))
        raise ValueError(
            f"The config of process {unlike[0]} is not that of process 0: {sorted(theirs - ours)} "
            f"for {sorted(ours - theirs)}. Start all processes with the same arguments."
        )


def _once(check: Callable[[], None]) -> None:
    """Check something in one process; all stop if it finds a fault."""
    error = None
    if comm.is_main_process():
        try:
            check()
        except (ValueError, OSError) as found:
            error = found
    error = comm.all_gather(error)[0]
    if error is not None:
        raise error


def _check_data(cfg: CfgNode, *, train: bool) -> None:
    for summary in check_datasets(cfg, train=train):
        logger.info("%s", summary)
