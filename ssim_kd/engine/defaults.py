"""What train_net.py does: read the config, set up, then train or evaluate."""

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import write_stock_config
from ..config_files import is_lazy
from ..data import check_datasets, register_datasets
from .config_loading import AddConfig, load_lazy, load_yaml
from .errors import start_up, with_one_line_errors
from .evaluation import (
    check_teacher,
    set_up_evaluation,
    student_for_evaluation,
    teacher_for_evaluation,
    test_time_augmentation,
)
from .launch import launch_processes
from .lazy import lazy_main
from .output_lock import output_lock
from .preflight import (
    check_schedule,
    check_scored,
    check_start,
    warn_of_same_weights,
)
from .report import log_version
from .trainer import DistillTrainer, is_overridden

logger = logging.getLogger(__name__)

_FLAGS = ("resume", "eval_only", "eval_teacher")


def run(
    args: argparse.Namespace,
    add_config: AddConfig | None = None,
    *,
    trainer: type[DistillTrainer] = DistillTrainer,
) -> Any:
    """Train or evaluate, in as many processes as the command line asks for.

    An error before the first step ends the program with status 1 and one line; its traceback is in
    ``OUTPUT_DIR/log.txt``.

    Args:
        args: of :func:`ssim_kd.engine.argument_parser`.
        add_config: adds further keys to the config (those of projects); picklable.
        trainer: a subclass with loaders, evaluators, hooks or a model of its own; picklable.

    Returns:
        the results of the evaluation if they are computed in this process, else None.

    Example:
        >>> class Trainer(DistillTrainer):
        ...     @classmethod
        ...     def build_train_loader(cls, cfg):
        ...         return build_train_loader(cfg, mapper=MyMapper(cfg))
        >>> run(argument_parser().parse_args(), trainer=Trainer)
    """
    with with_one_line_errors():
        # Before any process is started: a wrong key is then reported once.
        if is_lazy(args.config_file):
            with start_up():
                lazy = load_lazy(args)
            return launch_processes(
                lazy_main, args, device=lazy.cfg.train.device, main_args=(args, lazy.facts)
            )
        with start_up():
            loaded = load_yaml(args, add_config)
        return launch_processes(
            _run_process,
            args,
            device=loaded.cfg.MODEL.DEVICE,
            main_args=(args, add_config, trainer, loaded.facts),
        )


def main(
    args: argparse.Namespace,
    add_config: AddConfig | None = None,
    *,
    trainer: type[DistillTrainer] = DistillTrainer,
) -> Any:
    """Train or evaluate in this process, which is one of one or more. Arguments as in run()."""
    with contextlib.ExitStack() as stack:
        return _prepare(stack, args, add_config, trainer, {})()


def _run_process(
    args: argparse.Namespace,
    add_config: AddConfig | None,
    trainer: type[DistillTrainer],
    facts: dict[str, int],
) -> Any:
    with contextlib.ExitStack() as stack:
        with start_up():
            work = _prepare(stack, args, add_config, trainer, facts)
        return work()


def _prepare(
    stack: contextlib.ExitStack,
    args: argparse.Namespace,
    add_config: AddConfig | None,
    trainer: type[DistillTrainer],
    facts: dict[str, int],
) -> Callable[[], Any]:
    """All that comes before the first step; returns what is then left to do."""
    loaded = load_yaml(args, add_config, facts)
    cfg = loaded.cfg
    # What Detectron2's default_setup opens.
    args = argparse.Namespace(**{**vars(args), "config_file": loaded.config_file})
    _check_same_on_all(cfg, args)
    _make_output_dir(cfg.OUTPUT_DIR)
    if args.eval_only or args.eval_teacher:
        return _prepare_evaluation(cfg, args, trainer)
    # Before anything is written there.
    stack.enter_context(output_lock(cfg.OUTPUT_DIR))
    return _prepare_training(cfg, args, trainer, loaded.notes)


def _make_output_dir(folder: str) -> None:
    if not folder:  # an evaluation without a log
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


def _prepare_evaluation(
    cfg: CfgNode, args: argparse.Namespace, trainer: type[DistillTrainer]
) -> Callable[[], Any]:
    set_up_evaluation(cfg.OUTPUT_DIR, args, cfg.dump(), seed=cfg.SEED)
    register_datasets(cfg)
    _once(lambda: _check_data(cfg, trainer, train=False))
    if args.eval_teacher:
        cfg, model = teacher_for_evaluation(cfg)
    else:
        cfg, model = student_for_evaluation(cfg, resume=args.resume)

    def evaluate() -> Any:
        results = trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(test_time_augmentation(cfg, model, trainer))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    return evaluate


def _prepare_training(
    cfg: CfgNode,
    args: argparse.Namespace,
    trainer_class: type[DistillTrainer],
    notes: Sequence[str],
) -> Callable[[], Any]:
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ssim_kd")
    log_version()
    for note in notes:
        logger.info("%s", note)
    check_schedule(cfg, trainer_class)
    register_datasets(cfg)
    _once(lambda: check_start(cfg, resume=args.resume))
    _once(lambda: _check_data(cfg, trainer_class, train=True))
    if comm.is_main_process():
        # What deploys the student: a config that stock Detectron2 reads.
        write_stock_config(cfg, os.path.join(cfg.OUTPUT_DIR, "student.yaml"))
    trainer = trainer_class(cfg)
    _once(trainer.check_evaluation)
    trainer.resume_or_load(resume=args.resume)
    if trainer.teacher_sha256 and not trainer.start_iter:
        if comm.is_main_process():
            warn_of_same_weights(cfg)
        expected = cfg.MODEL.DISTILL.TEACHER.EXPECTED_AP
        if expected:
            check_teacher(cfg, trainer_class, expected)
    _once(trainer.start_trackers)
    return trainer.train


def _check_same_on_all(cfg: CfgNode, args: argparse.Namespace) -> None:
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
        except Exception as found:
            error = found
    error = comm.all_gather(error)[0]
    if error is not None:
        raise error


def _check_data(cfg: CfgNode, trainer: type[DistillTrainer], *, train: bool) -> None:
    summaries = check_datasets(
        cfg,
        train=train,
        own_loader=is_overridden(trainer, DistillTrainer, "build_train_loader"),
        own_evaluator=any(
            is_overridden(trainer, DistillTrainer, method) for method in ("build_evaluator", "test")
        ),
    )
    for summary in summaries:
        logger.info("%s", summary)
    if train:
        check_scored(cfg, summaries)
