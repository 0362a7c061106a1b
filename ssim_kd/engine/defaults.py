"""What train_net.py does: read the config, set up, then train or evaluate."""

import argparse
import contextlib
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

from ..config import add_distill_config, share_keys, write_stock_config
from ..config_files import did_you_mean, find_config_file, merge_file
from ..data import check_datasets, register_datasets
from .arguments import (
    apply_data,
    apply_schedule,
    apply_teacher,
    resolved_options,
    use_cpu_without_gpu,
)
from .errors import start_up, with_one_line_errors
from .evaluation import (
    check_teacher,
    set_up_evaluation,
    student_for_evaluation,
    teacher_for_evaluation,
    test_time_augmentation,
)
from .launch import launch_processes
from .lazy import is_lazy, lazy_main, load_lazy_config
from .output_lock import output_lock
from .preflight import (
    check_config,
    check_schedule,
    check_scored,
    check_start,
    warn_of_same_weights,
)
from .report import log_version
from .trainer import DistillTrainer, is_overridden

logger = logging.getLogger(__name__)

_FLAGS = ("resume", "eval_only", "eval_teacher")
# Config keys that hold paths, in which "~" is the user's home.
_PATHS = (
    *("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DISTILL.TEACHER.CONFIG_FILE"),
    *("MODEL.DISTILL.TEACHER.WEIGHTS", "DATASETS.PROPOSAL_FILES_TRAIN"),
    "DATASETS.PROPOSAL_FILES_TEST",
)

AddConfig = Callable[[CfgNode], None]


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
                device = load_lazy_config(args).train.device
            return launch_processes(lazy_main, args, device=device, main_args=(args,))
        with start_up():
            cfg = load_config(args, add_config)
            if getattr(args, "epochs", None) or getattr(args, "batch", None) or cfg.SOLVER.EPOCHS:
                # Once for all processes.
                args.opts = [*args.opts, *resolved_options(cfg)]
                args.epochs = args.batch = None
        return launch_processes(
            _run_process, args, device=cfg.MODEL.DEVICE, main_args=(args, add_config, trainer)
        )


def main(
    args: argparse.Namespace,
    add_config: AddConfig | None = None,
    *,
    trainer: type[DistillTrainer] = DistillTrainer,
) -> Any:
    """Train or evaluate in this process, which is one of one or more. Arguments as in run()."""
    with contextlib.ExitStack() as stack:
        return _prepare(stack, args, add_config, trainer)()


def _run_process(
    args: argparse.Namespace, add_config: AddConfig | None, trainer: type[DistillTrainer]
) -> Any:
    with contextlib.ExitStack() as stack:
        with start_up():
            work = _prepare(stack, args, add_config, trainer)
        return work()


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
    notes += use_cpu_without_gpu(cfg, by_hand | in_file)
    args.notes = [*getattr(args, "notes", []), *notes]
    check_config(cfg, evaluate=evaluate)
    cfg.freeze()
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> set[str]:
    """Merge a config file; returns the keys that it and its bases set."""
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
    flags = [text for text in opts[::2] if str(text).startswith("--")]
    if flags:
        raise ValueError(
            f"{flags[0]} stands behind KEY VALUE pairs, where it is not read; expected flags "
            "before the first pair."
        )
    if len(opts) % 2:
        raise ValueError(f"{opts[-1]} has no value; expected KEY VALUE pairs, not {opts}.")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if isinstance(_get(cfg, key), float) and re.fullmatch(r"[+-]?\d+", str(value)):
            value = f"{value}.0"  # a whole number for a float
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


def _prepare(
    stack: contextlib.ExitStack,
    args: argparse.Namespace,
    add_config: AddConfig | None,
    trainer: type[DistillTrainer],
) -> Callable[[], Any]:
    """All that comes before the first step; returns what is then left to do."""
    cfg = load_config(args, add_config)
    _check_same_on_all(cfg, args)
    _make_output_dir(cfg.OUTPUT_DIR)
    if args.eval_only or args.eval_teacher:
        return _prepare_evaluation(cfg, args, trainer)
    # Before anything is written there.
    stack.enter_context(output_lock(cfg.OUTPUT_DIR))
    return _prepare_training(cfg, args, trainer)


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
    cfg: CfgNode, args: argparse.Namespace, trainer_class: type[DistillTrainer]
) -> Callable[[], Any]:
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ssim_kd")
    log_version()
    for note in dict.fromkeys(args.notes):
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
