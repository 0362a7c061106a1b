"""Training and evaluation of a LazyConfig (.py), as Detectron2's lazyconfig_train_net.py does.

The config has Detectron2's own parts: ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader``
and ``train``. Distillation is a matter of ``model``::

    model = L(DistilledDetector)(
        student=student,                                  # any model of the zoo's LazyConfigs
        teacher=L(FrozenTeacher.load_from)(name="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"),
        distillers=[L(SSIMDistiller)(weight=4.0)],
        max_iter="${..train.max_iter}",
    )

``--teacher`` puts the same around a plain model. ``train.writers`` takes further writers:
``[L(MLflowWriter)(folder="${train.output_dir}")]``.
"""

import argparse
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import create_ddp_model, default_setup, hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from ..checkpoint import StudentCheckpointer, load_strictly, read_weights
from ..modeling import DistilledDetector
from .config_loading import load_lazy
from .errors import start_up
from .evaluation import set_up_evaluation
from .hooks import share_buffers
from .optimizer import add_groups
from .output_lock import output_lock
from .report import log_version, write_report
from .signals import StopOnSignal
from .trackers import TrackerWriter
from .train_loop import DistillStep
from .writers import GuardedWriter, PeriodicWriter

logger = logging.getLogger(__name__)

# What DistillTrainer takes from SOLVER.
GRACE_PERIOD = 25.0


def lazy_main(args: argparse.Namespace, facts: dict[str, int] | None = None) -> Any:
    """Train or evaluate a LazyConfig in this process, one of one or more."""
    with contextlib.ExitStack() as stack:
        with start_up():
            work = _prepare(stack, args, facts)
        return work()


def _prepare(
    stack: contextlib.ExitStack, args: argparse.Namespace, facts: dict[str, int] | None
) -> Callable[[], Any]:
    """All that comes before the first step; returns what is then left to do."""
    loaded = load_lazy(args, facts)
    cfg = loaded.cfg
    # What Detectron2's default_setup opens.
    args = argparse.Namespace(**{**vars(args), "config_file": loaded.config_file})
    folder = cfg.train.output_dir
    PathManager.mkdirs(folder)
    if args.eval_only:
        seed = cfg.train.get("seed", -1)
        set_up_evaluation(folder, args, OmegaConf.to_yaml(cfg.train), seed=seed)
        model = _student_for_evaluation(cfg, args)
        return lambda: _evaluate(cfg, model)
    stack.enter_context(output_lock(folder))
    default_setup(cfg, args)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="ssim_kd")
    log_version()
    for note in loaded.notes:
        logger.info("%s", note)
    return _prepare_training(cfg, args)


def _student_for_evaluation(cfg: DictConfig, args: argparse.Namespace) -> torch.nn.Module:
    """Build the student alone, whose weights must fit to the last key."""
    node = cfg.model.get("student", cfg.model)
    model: torch.nn.Module = instantiate(node).to(cfg.train.device)
    path = cfg.train.init_checkpoint
    if args.resume:
        path = StudentCheckpointer(model, cfg.train.output_dir).newest() or path
    load_strictly(model, read_weights(path, key="train.init_checkpoint"))
    return model


def _evaluate(cfg: DictConfig, model: torch.nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results


class LazyTrainer(DistillStep):
    """The training loop of a LazyConfig; stops orderly on SIGTERM.

    Its data loader is the config's own, so that a resumed run has weights, optimizer and scheduler
    of the interrupted one, but not its order of images.
    """

    checkpointer: StudentCheckpointer
    results: Any = None
    student: torch.nn.Module

    def request_stop(self) -> None:
        """Ask for an orderly end after the current step."""
        self.stop_requested = True

    def after_train(self) -> None:
        """Take in the last reports, then run the hooks."""
        if self.iter >= self.max_iter:
            self.flush()
        self.close()
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks (the scheduler among them), optimizer and scaler."""
        self.flush()
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _prepare_training(cfg: DictConfig, args: argparse.Namespace) -> Callable[[], Any]:
    model = instantiate(cfg.model).to(cfg.train.device)
    distills = isinstance(model, DistilledDetector) and model.teacher is not None
    if distills:
        model.load_teacher()
        model.log_period = 0
    student = model.student if isinstance(model, DistilledDetector) else model
    cfg.optimizer.params.model = model
    main = instantiate(cfg.optimizer)
    base_lr = main.defaults["lr"]
    optimizer = add_groups(main, model, base_lr=base_lr, max_iter=cfg.train.max_iter)
    on_gpu = next(model.parameters()).is_cuda
    ddp = create_ddp_model(
        model,
        broadcast_buffers=False,
        device_ids=[torch.cuda.current_device()] if on_gpu else None,
    )
    trainer = LazyTrainer(
        ddp,
        instantiate(cfg.dataloader.train),
        optimizer,
        amp=cfg.train.amp.enabled,
        output_dir=cfg.train.output_dir,
        log_period=cfg.train.log_period,
        eval_period=cfg.train.eval_period,
    )
    trainer.student = student
    trainer.checkpointer = StudentCheckpointer(
        student,
        cfg.train.output_dir,
        trainer=trainer,
        **({"distillers": model.distillers} if distills else {}),
    )

    def evaluate() -> Any:
        share_buffers(student)
        trainer.results = _evaluate(cfg, student)
        return trainer.results

    trainer.max_iter = cfg.train.max_iter
    writers = _build_writers(cfg) if comm.is_main_process() else []
    stop = StopOnSignal(GRACE_PERIOD)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            stop,
            hooks.PeriodicCheckpointer(trainer.checkpointer, **cfg.train.checkpointer)
            if comm.is_main_process()
            else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            PeriodicWriter(writers, period=cfg.train.log_period, eval_period=cfg.train.eval_period)
            if writers
            else None,
        ]
    )
    resumed = trainer.checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    if resumed:
        logger.warning(
            "--resume: the data loader of a LazyConfig begins anew, so that the order of images is "
            "not that of an uninterrupted run."
        )
    for writer in writers:
        if isinstance(writer.writer, TrackerWriter):
            writer.writer.start(resume=resumed)

    def train() -> Any:
        try:
            trainer.train(trainer.iter + 1 if resumed else 0, trainer.max_iter)
        finally:
            stop.give_back()
        if cfg.train.get("report", True):
            write_report(cfg.train.output_dir)
        return trainer.results

    return train


def _build_writers(cfg: DictConfig) -> list[GuardedWriter]:
    """Those of ``train.writers`` first: TensorBoard's clears the pictures."""
    own = list(instantiate(cfg.train.get("writers", [])))
    for writer in own:
        if isinstance(writer, TrackerWriter) and not writer.params:
            writer.params = OmegaConf.to_container(cfg)
    return [
        GuardedWriter(w) for w in (*own, *default_writers(cfg.train.output_dir, cfg.train.max_iter))
    ]
