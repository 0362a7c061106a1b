"""The trainer: Detectron2's DefaultTrainer, with exact resume, an orderly end and late metrics."""

import logging
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..checkpoint import StudentCheckpointer
from ..data import EvaluationLoader, TrainLoader, build_evaluation_loader, build_train_loader
from ..modeling import DistilledDetector
from .evaluation import build_evaluator, build_tta_model, test_time_augmentation
from .hooks import (
    BestCheckpoint,
    PreciseBN,
    RankStates,
    Reseed,
    SavedEvaluation,
    VisualizeDistillation,
)
from .optimizer import build_optimizer
from .preflight import check_evaluation, named
from .report import write_report
from .resume import ExactResume, settings_of
from .signals import StopOnSignal
from .trackers import TrackerWriter, build_trackers
from .train_loop import DistillStep
from .writers import GuardedWriter, PeriodicWriter

logger = logging.getLogger(__name__)


class DistillTrainer(ExactResume):
    """Trains what ``cfg`` describes: a :class:`DistilledDetector` or any stock detector.

    Differences from DefaultTrainer: checkpoints hold the plain student under "model", and all that
    an exact resume needs; processes may run on CPUs; metrics are read one step late; an evaluation
    scores on every process what is saved.

    Subclass it as you would DefaultTrainer: ``build_model``, ``build_optimizer``,
    ``build_lr_scheduler``, ``build_train_loader``, ``build_test_loader``, ``build_evaluator``,
    ``build_hooks``, ``build_writers`` and ``test`` are used as there. A training loader that is no
    :class:`ssim_kd.data.TrainLoader` (Detectron2's own, for example) costs the exact resume: a
    warning says so.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer.__init__ can be extended at none of the points where this one differs;
        # its build_* methods, hooks and loop are used as they are.
        TrainerBase.__init__(self)
        with named("SOLVER.REFERENCE_WORLD_SIZE, SOLVER.IMS_PER_BATCH"):
            cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._started_with = settings_of(cfg)
        self._stop = StopOnSignal(cfg.SOLVER.GRACE_PERIOD)
        self._best = BestCheckpoint()

        model = self.build_model(cfg)
        distills = isinstance(model, DistilledDetector) and model.teacher is not None
        if distills:
            # Now rather than in the first step: what is wrong with its weights is known at once.
            model.teacher.load()
            # This trainer logs the metrics itself, a step late.
            model.log_period = 0
        self.student = model.student if isinstance(model, DistilledDetector) else model
        with named("SOLVER (the optimizer)"):
            optimizer = self.build_optimizer(cfg, model)
        on_gpu = next(model.parameters()).is_cuda
        ddp = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=[torch.cuda.current_device()] if on_gpu else None,
        )
        self._trainer = DistillStep(
            ddp,
            self._train_loader(cfg),
            optimizer,
            amp=cfg.SOLVER.AMP.ENABLED,
            max_skipped=cfg.SOLVER.MAX_SKIPPED_STEPS,
            output_dir=cfg.OUTPUT_DIR,
            accumulate=cfg.SOLVER.ACCUMULATE,
            eval_period=cfg.TEST.EVAL_PERIOD,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        own = {"distillers": model.distillers} if distills else {}
        self.teacher_sha256 = model.teacher.sha256 if distills else ""
        self.checkpointer = StudentCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP,
            partial=cfg.MODEL.WEIGHTS_PARTIAL,
            # First: it logs what has changed in the config, before anything else does not fit.
            trainer=weakref.proxy(self),
            **own,
        )
        self.register_hooks(self.build_hooks())

    def _train_loader(self, cfg: CfgNode) -> Any:
        with named("DATASETS, DATALOADER or INPUT (the training loader)"):
            loader = self.build_train_loader(cfg)
        if isinstance(loader, TrainLoader):
            self.seed = int(loader.seed)
        else:
            self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
            logger.warning(
                "%s.build_train_loader returns a %s, whose order of images a resume cannot take "
                "up: all else is restored. Exact is ssim_kd.data.build_train_loader(cfg, "
                "mapper=..., dataset=...).",
                *(type(self).__name__, type(loader).__name__),
            )
        return loader

    def build_hooks(self) -> list[Any]:
        """DefaultTrainer's hooks, and those of an exact resume and of an orderly end.

        The order of hooks with collective operations is the same on every process.
        """
        cfg = self.cfg
        found = [hook for hook in super().build_hooks() if hook is not None]
        for i, hook in enumerate(found):
            if isinstance(hook, hooks.EvalHook):
                found[i] = SavedEvaluation(cfg.TEST.EVAL_PERIOD, self._test, self._stop)
                found.insert(i + 1, self._best)
            if isinstance(hook, hooks.PeriodicWriter):
                found[i] = PeriodicWriter(hook._writers, eval_period=cfg.TEST.EVAL_PERIOD)
            if isinstance(hook, hooks.PreciseBN) and isinstance(self.data_loader, TrainLoader):
                found[i] = PreciseBN.replacing(hook, self.student)
        # Behind all that changes the model or the learning rate, whose state after the step a
        # checkpoint holds; before all that saves.
        changes = (hooks.LRScheduler, hooks.PreciseBN)
        place = 1 + max(i for i, hook in enumerate(found) if isinstance(hook, changes))
        found[place:place] = [RankStates(self.student, self._checkpoint_is_due), self._stop]
        # Pictures and TTA before the writers, which the main process alone has.
        place = 1 + max(i for i, hook in enumerate(found) if isinstance(hook, SavedEvaluation))
        if cfg.TEST.AUG.ENABLED:
            found.insert(place, SavedEvaluation(0, self._test_with_augmentation, self._stop))
        model = getattr(self.model, "module", self.model)
        distills = isinstance(model, DistilledDetector) and model.teacher is not None
        if distills and cfg.VIS_PERIOD > 0 and comm.is_main_process():
            found.insert(place, VisualizeDistillation(cfg))
        return [Reseed(), *found]

    def build_writers(self) -> list[EventWriter]:
        """DefaultTrainer's writers and the trackers; none of them can stop the training."""
        # The trackers first: TensorBoard's writer clears the pictures.
        return [GuardedWriter(w) for w in (*build_trackers(self.cfg), *super().build_writers())]

    def start_trackers(self) -> None:
        """Open the run in each tracker, or go on with it where the training was resumed.

        Raises:
            ValueError: a tracker cannot be reached or configured.
        """
        for hook in self._writers_hooks():
            for writer in hook._writers:
                tracker = writer.writer if isinstance(writer, GuardedWriter) else writer
                if isinstance(tracker, TrackerWriter):
                    tracker.start(resume=self.start_iter > 0)

    def _writers_hooks(self) -> list[hooks.PeriodicWriter]:
        return [hook for hook in self._hooks if isinstance(hook, hooks.PeriodicWriter)]

    def _checkpoint_is_due(self) -> bool:
        done, period = self.iter + 1, self.cfg.TEST.EVAL_PERIOD
        return (
            done % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0
            or done >= self.max_iter
            or (period > 0 and done % period == 0)
            or self.should_stop
        )

    def check_evaluation(self) -> None:
        """See :func:`ssim_kd.engine.preflight.check_evaluation`; builds the TTA wrapper as well.

        A subclass with a ``test`` of its own is not checked.
        """
        if is_overridden(self, DefaultTrainer, "test"):
            return
        own_loader = not is_overridden(self, DistillTrainer, "build_test_loader")
        check_evaluation(self.cfg, self, own_loader=own_loader)
        if self.cfg.TEST.AUG.ENABLED:
            build_tta_model(self.cfg, self.student)

    def _test(self) -> OrderedDict:
        # What train() returns.
        self._last_eval_results = self.test(self.cfg, self.model)
        self._best.offer(self._last_eval_results, self.cfg.DATASETS.TEST)
        return self._last_eval_results

    def _test_with_augmentation(self) -> OrderedDict:
        return test_time_augmentation(self.cfg, self.student, self)

    def after_train(self) -> None:
        """Write what is still on its way, then run the hooks; after an error do not evaluate."""
        if self.iter >= self.max_iter:
            self._trainer.flush()
        else:
            # In the last iteration EvalHook takes a failed training for a finished one.
            self._hooks[:] = [h for h in self._hooks if not isinstance(h, hooks.EvalHook)]
        # The workers end here, also where an error's traceback keeps the iterator.
        self._trainer.close()
        try:
            super().after_train()
        except BaseException:
            # An evaluation, say: the writers, whose turn has not come, hold results and open runs.
            for hook in self._writers_hooks():
                hook.after_train()
            raise
        finally:
            self._stop.give_back()
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.log_skipped()
        # Behind all that has to be saved: SIGTERM may end the process here.
        if self.iter >= self.max_iter and self.cfg.TEST.REPORT:
            write_report(self.cfg.OUTPUT_DIR)

    def request_stop(self) -> None:
        """Ask for an orderly end after the current step."""
        self._trainer.stop_requested = True

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked for an end."""
        return self._trainer.stop_requested

    @property
    def should_stop(self) -> bool:
        """Whether any process asked for an end; the same on all after each step."""
        return self._trainer.should_stop

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """See :func:`ssim_kd.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """A loader whose batches depend on the seed and the iteration alone.

        A subclass may return :func:`ssim_kd.data.build_train_loader` with a mapper or dataset of
        its own, or any other iterable of batches without end, which costs the exact resume.
        """
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> EvaluationLoader:
        """Detectron2's own; errors name the image, and no SIGTERM ends its workers."""
        return build_evaluation_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`ssim_kd.engine.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)


def is_overridden(trainer: Any, base: type, name: str) -> bool:
    """Whether a trainer, or its class, has a method other than that of ``base``."""
    method, original = getattr(trainer, name), getattr(base, name)
    return getattr(method, "__func__", method) is not original.__func__
